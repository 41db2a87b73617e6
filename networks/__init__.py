"""Networks: forward(xt, time, label, **cond) -> like xt. Read ../unet.py first, which has what they share, then:

table.py         NETWORKS, and the scaling of inputs around each: forward(xt, t, label, **cond)
residual_mlp.py  MLP, for points, vectors and other small data
transformer.py   DiT, for signals, images and volumes
"""

from networks.table import NETWORKS, TIME_INPUTS, ScaledNetwork, get_network, mlp

__all__ = ['NETWORKS', 'TIME_INPUTS', 'ScaledNetwork', 'get_network', 'mlp']
