"""Moving averages (EMA) of a network's weights. Each average is a network that can be called.

training/posthoc.py makes averages of other lengths from them after training.
"""

import copy
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config import choose

lerp_, copy_ = torch._foreach_lerp_, torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]


@cache
def gamma_of(width: float) -> float:
    """The exponent of a power-function average: update k has a share proportional to k^gamma. `width` is the standard
    deviation of the averaged updates, as a fraction of all, below 0.288 (Karras et al. 2024, algorithm 2)."""
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


# name -> (an entry of ema_decays, n = 1, 2, ...) -> factor d of the average at update n: ema <- d ema + (1 - d) weights
EMA_TYPES: dict[str, Callable[[float, Any], Any]] = {
    # The average of a short run is not mostly its random initial weights (warm-up of TensorFlow's averages).
    'exponential': lambda decay, n: np.minimum(decay, (1 + n) / (10 + n)),
    'power': lambda width, n: (1 - 1 / n) ** (gamma_of(width) + 1),  # Karras et al. 2024, eq. 2
}


class EMA:
    """One averaged copy of `network` for each of `decays`, by EMA_TYPES[kind]. Buffers are copied."""

    def __init__(self, network: nn.Module, decays: tuple[float, ...], kind: str = 'exponential'):
        """Raises SettingError for an unknown kind."""
        self.kind, self.decay_at, self.num_updates = kind, choose('ema_type', kind, EMA_TYPES), 0
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
        parameters, buffers = map(tensors_at, self.places_in_source)
        for decay, places in self.places.items():
            averaged, copied = map(tensors_at, places)
            if parameters:
                lerp_(averaged, parameters, 1 - float(self.decay_at(decay, self.num_updates)))
            if buffers:
                copy_(copied, buffers)

    def reset(self, network: nn.Module) -> None:
        """Start again from the weights of `network`."""
        self.num_updates = 0
        for average in self.networks.values():
            average.load_state_dict(network.state_dict())

    def state_dict(self) -> dict:
        return {
            'kind': self.kind,
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
