"""Running means of named values, over steps and ranks."""

import math
from functools import partial

import torch
from torch import Tensor

from runtime import ranks

Number = Tensor | float


class RunningMeans:
    """Means of named values since the last `clear`.

    Values are kept as they come, and summed when the means are asked for or MOST are waiting: a training step pays no
    kernel and no CPU-GPU sync for them. On the CPU the sums do not depend on when that happens, to the last bit.
    """

    MOST = 1000  # calls whose values wait

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}  # name -> [sum, count], float64
        self.waiting: dict[tuple[str, int, bool], list[tuple[Number, ...]]] = {}  # (name, bins, counted) -> calls
        self.calls = 0

    def add(self, name: str, total: Number, count: Number) -> None:
        """Add `total`, the sum of `count` values: tensors of one element, or numbers."""
        self._keep((name, 0, True), total, count)

    def put(self, name: str, value: float) -> None:
        """`value` in place of what was added: for what has a value at a step, not a mean over steps."""
        self.sums.pop(name, None)
        self.waiting.pop((name, 0, True), None)
        self.add(name, value, 1)

    def add_finite(self, name: str, values: Tensor) -> None:
        """Add those of `values` that are finite: a bad step must not hide the others."""
        self._keep((name, 0, False), values)

    def add_by_time(self, name: str, values: Tensor, t: Tensor, bins: int = 10) -> None:
        """Add values (B,), those that are finite, to the mean of their interval of t (B,): `name`_0.0_0.1 and so on."""
        self._keep((name, bins, False), values, t)

    def _keep(self, key: tuple[str, int, bool], *given: Number) -> None:
        own = tuple(x.detach().to(self.device) if isinstance(x, Tensor) else x for x in given)
        self.waiting.setdefault(key, []).append(own)
        self.calls += 1
        if self.calls >= self.MOST:
            self._fold()

    def _column(self, values: tuple[Number, ...]) -> Tensor:
        """All elements of the values, one after the other, on the device."""
        if not any(isinstance(value, Tensor) for value in values):
            return torch.tensor(values, dtype=torch.float64).to(self.device, non_blocking=True)
        double = partial(torch.tensor, dtype=torch.float64, device=self.device)
        return torch.cat([x.reshape(-1) if isinstance(x, Tensor) else double([x]) for x in values])

    def _fold(self) -> None:
        """Add to the sums what waits, in the order in which it came."""
        for (name, bins, counted), calls in self.waiting.items():
            totals, *others = map(self._column, zip(*calls, strict=True))
            counts = others[0] if counted else totals.isfinite()
            totals = totals if counted else totals.where(counts, 0)
            place = (others[0] * bins).long().clamp(0, bins - 1) if bins else torch.zeros_like(totals).long()
            names = [f'{name}_{i / bins:.1f}_{(i + 1) / bins:.1f}' for i in range(bins)] or [name]
            nothing = torch.zeros(2, dtype=torch.float64, device=self.device)
            table = torch.stack([self.sums.get(key, nothing) for key in names])  # (bins or 1, 2)
            for column, new in enumerate((totals, counts)):
                table[:, column].index_add_(0, place, new.double())
            self.sums |= zip(names, table, strict=True)
        self.waiting, self.calls = {}, 0

    def over_ranks(self) -> dict[str, Tensor]:
        """The sums of all ranks together, on the CPU. Ranks may have logged different names."""
        self._fold()
        names = sorted({name for on_rank in ranks.all_gather_objects(list(self.sums)) for name in on_rank})
        if not names:
            return {}
        nothing = torch.zeros(2, dtype=torch.float64, device=self.device)
        table = torch.stack([self.sums.get(name, nothing) for name in names])
        return dict(zip(names, ranks.all_reduce(table).cpu(), strict=True))  # CPU-GPU sync

    def means(self) -> dict[str, float]:
        """By name, to seven digits: what is left is the order of summation. A name with no count is left out."""
        pairs = {name: pair.tolist() for name, pair in self.over_ranks().items()}
        return {name: float(f'{total / count:.7g}') for name, (total, count) in pairs.items() if count > 0}

    def here(self, name: str) -> float:
        """The mean on this rank, NaN if there is none. Sends nothing."""
        self._fold()
        total, count = self.sums[name].tolist() if name in self.sums else (0.0, 0.0)  # CPU-GPU sync
        return total / count if count else math.nan

    def load(self, sums: dict[str, Tensor]) -> None:
        """Go on from `over_ranks` of a checkpoint."""
        self.clear()
        self.sums = {name: pair.to(self.device) for name, pair in sums.items()} if ranks.is_main() else {}
