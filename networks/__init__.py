"""Networks. Read table.py first: the table of networks and the scaling that they share."""

from networks.table import NETWORK_SETTINGS, NETWORKS, TIME_INPUTS, ScaledNetwork, get_network, mlp

__all__ = ['NETWORKS', 'NETWORK_SETTINGS', 'TIME_INPUTS', 'ScaledNetwork', 'get_network', 'mlp']
