"""Exponential moving averages (EMA) of a network's weights. Each average is a network that can be called.

training/posthoc.py makes averages of other lengths from them after training.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

lerp_, copy_ = torch._foreach_lerp_, torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]


class EMA:
    """One averaged copy of `network` per decay: ema <- d ema + (1 - d) weights.

    d = min(decay, (1 + n) / (10 + n)) at update n, so that the average of a short run is not mostly its random initial
    weights (the warm-up of TensorFlow's ExponentialMovingAverage). Buffers are copied.
    """

    def __init__(self, network: nn.Module, decays: tuple[float, ...]):
        self.num_updates = 0
        self.networks = {decay: copy.deepcopy(network).eval().requires_grad_(False) for decay in decays}
        self.places = {decay: places_of(average) for decay, average in self.networks.items()}
        self.source, self.places_in_source = network, places_of(network)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Call this after each optimizer step."""
        if not self.networks:
            return
        if self.source is not network:
            self.source, self.places_in_source = network, places_of(network)
        self.num_updates += 1
        warm = (1 + self.num_updates) / (10 + self.num_updates)
        parameters, buffers = map(tensors_at, self.places_in_source)
        for decay, places in self.places.items():
            averaged, copied = map(tensors_at, places)
            if parameters:
                lerp_(averaged, parameters, 1 - min(decay, warm))
            if buffers:
                copy_(copied, buffers)

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


Places = list[tuple[dict[str, Any], str]]


def places_of(network: nn.Module) -> tuple[Places, Places]:
    """Places of the parameters and of the buffers: (dict of a module, name in it). A shared tensor has one place.

    Found once, because a walk over the modules takes long. Places, not tensors, because `.to()` replaces buffers.
    """

    def places(kind: str, names: Iterable[str]) -> Places:
        split = [name.rpartition('.') for name in names]
        return [(getattr(network.get_submodule(path), kind), name) for path, _, name in split]

    parameters = places('_parameters', (name for name, _ in network.named_parameters()))
    return parameters, places('_buffers', (name for name, _ in network.named_buffers()))


def tensors_at(places: Places) -> list[Tensor]:
    return [tensors[name] for tensors, name in places]
