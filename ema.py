"""Exponential moving averages of a network's weights, each a network that can be called; and, after training, averages
of other lengths from those that were saved."""

import copy
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

MOST_STEPS = 20_000  # of which weights are told apart in a mixture
lerp_, copy_ = torch._foreach_lerp_, torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]


class EMA:
    """One averaged copy of `network` per decay: ema <- d ema + (1 - d) weights.

    d = min(decay, (1 + n) / (10 + n)) at update n, so that the average of a short run is not mostly its random start
    (the warm-up of TensorFlow's ExponentialMovingAverage). Buffers are copied.
    """

    def __init__(self, network: nn.Module, decays: tuple[float, ...]):
        self.num_updates = 0
        self.networks = {decay: copy.deepcopy(network).eval().requires_grad_(False) for decay in decays}
        self.averages = {decay: Tensors(average) for decay, average in self.networks.items()}
        self.source = Tensors(network)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """To be called after each optimizer step."""
        if not self.networks:
            return
        if self.source.network is not network:
            self.source = Tensors(network)
        self.num_updates += 1
        warm = (1 + self.num_updates) / (10 + self.num_updates)
        parameters, buffers = self.source.parameters(), self.source.buffers()
        for decay, average in self.averages.items():
            if parameters:
                lerp_(average.parameters(), parameters, 1 - min(decay, warm))
            if buffers:
                copy_(average.buffers(), buffers)

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


def weights_of_steps(decay: float, n: int) -> np.ndarray:
    """How much the weights after update 1, ..., n count in the average at update n, (n,); the rest is the start's."""
    update = np.arange(1, n + 1)
    decays = np.minimum(decay, (1 + update) / (10 + update))
    later = np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)  # product of the decays after each update
    return (1 - decays) * later


def power_profile(relative_width: float, n: int) -> np.ndarray:
    """The same for an average whose length grows with the training: update k counts as k^gamma, of a standard deviation
    of `relative_width` of all n updates (Karras et al. 2024, eq. 2 and algorithm 2)."""
    inverse = relative_width**-2
    gamma = np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()
    counts = (np.arange(1, n + 1) / n) ** gamma
    return counts / counts.sum()


def posthoc_mixture(saved: Sequence[tuple[float, int]], relative_width: float, n: int) -> tuple[np.ndarray, float]:
    """(factors, error): the sum of saved averages, each (decay, number of its update; 0 for raw weights), that comes
    nearest to the power profile at update n. The factors sum to 1. `error` is the norm of what is left of the profile,
    in units of its own norm.

    The mixture of Karras et al. 2024, section 3.2, made from ordinary averages, whose weights of steps are known.
    """
    blocks = np.arange(0, n, -(-n // MOST_STEPS))  # steps of a long training are taken together
    profiles = np.zeros((len(saved), len(blocks)))
    for row, (decay, updates) in zip(profiles, saved, strict=True):
        row[:] = np.add.reduceat(np.pad(weights_of_steps(decay, updates), (0, n - updates)), blocks)
    target = np.add.reduceat(power_profile(relative_width, n), blocks)
    free = profiles[1:] - profiles[0]  # with factors that sum to 1
    factors = np.linalg.lstsq(free.T, target - profiles[0], rcond=1e-10)[0]
    factors = np.concatenate([[1 - factors.sum()], factors])
    return factors, float(np.linalg.norm(factors @ profiles - target) / np.linalg.norm(target))


class Tensors:
    """The parameters and buffers of a network whose modules stay, without a walk over these in each step.

    Not the tensors are remembered but where they hang: `.to()` puts new buffers in their places. No place is empty:
    `named_parameters` and `named_buffers` leave those out.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self.parameter_places = self._places(name for name, _ in network.named_parameters())
        self.buffer_places = self._places(name for name, _ in network.named_buffers())

    def _places(self, names: Iterable[str]) -> list[tuple[nn.Module, str]]:
        """(module, name in it) of each; a tensor that several modules share has one place."""
        split = [name.rpartition('.') for name in names]
        return [(self.network.get_submodule(path), name) for path, _, name in split]

    def parameters(self) -> list[Tensor]:
        return cast(list[Tensor], [module._parameters[name] for module, name in self.parameter_places])

    def buffers(self) -> list[Tensor]:
        return cast(list[Tensor], [module._buffers[name] for module, name in self.buffer_places])
