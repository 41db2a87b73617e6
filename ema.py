"""Exponential moving averages of a network's weights, each a network that can be called."""

import copy

import torch
from torch import nn


class EMA:
    """One averaged copy of `network` per decay: ema <- d ema + (1 - d) weights.

    d = min(decay, (1 + n) / (10 + n)) at update n, so that the average of a short run is not mostly its random start
    (the warm-up of TensorFlow's ExponentialMovingAverage). Buffers are copied.
    """

    def __init__(self, network: nn.Module, decays: tuple[float, ...]):
        self.num_updates = 0
        self.networks = {decay: copy.deepcopy(network).eval().requires_grad_(False) for decay in decays}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """To be called after each optimizer step."""
        self.num_updates += 1
        warm = (1 + self.num_updates) / (10 + self.num_updates)
        for decay, average in self.networks.items():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - min(decay, warm))
            for mine, theirs in zip(average.buffers(), network.buffers(), strict=True):
                mine.copy_(theirs)

    def reset(self, network: nn.Module) -> None:
        """Start again from the weights of `network`."""
        self.num_updates = 0
        for average in self.networks.values():
            average.load_state_dict(network.state_dict())

    def state_dict(self) -> dict:
        return {
            'num_updates': self.num_updates,
            'networks': {decay: net.state_dict() for decay, net in self.networks.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        self.num_updates = state['num_updates']
        for decay, average in self.networks.items():
            average.load_state_dict(state['networks'][decay])
