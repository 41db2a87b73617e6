"""Running means of named values, over steps and ranks."""

import math
from functools import partial

import torch
from torch import Tensor

import utils
from runtime import ranks

Number = Tensor | float


class RunningMeans:
    """Means of named values since the last `clear`.

    Values are stored as they come, and summed when the means are read or MOST calls are waiting: a training step pays
    for no kernel and no CPU-GPU sync. On the CPU the sums are bit-identical whenever that happens.
    """

    MOST = 1000  # calls that may wait to be summed

    def __init__(self, device: torch.device):
        self.device = torch.device('cpu') if device.type in utils.NO_FLOAT64 else device
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}  # name -> [sum, count], float64
        self.waiting: dict[tuple[str, int, bool], list[tuple[Number, ...]]] = {}  # (name, bins, has_count) -> calls
        self.calls = 0

    def add(self, name: str, total: Number, count: Number) -> None:
        """Add `total`, the sum of `count` values: both are numbers or tensors of one element."""
        self._keep((name, 0, True), total, count)

    def put(self, name: str, value: float) -> None:
        """Replace what was added by `value`: for quantities that are reported for one step, not averaged over steps."""
        self.sums.pop(name, None)
        self.waiting.pop((name, 0, True), None)
        self.add(name, value, 1)

    def add_finite(self, name: str, values: Tensor) -> None:
        """Add the finite ones of `values`: one bad step must not turn the whole mean into NaN."""
        self._keep((name, 0, False), values)

    def add_by_time(self, name: str, values: Tensor, t: Tensor, bins: int = 10) -> None:
        """Add the finite `values` (B,), each to the mean of its interval of t (B,): `name`_0.0_0.1 and so on."""
        self._keep((name, bins, False), values, t)

    def _keep(self, key: tuple[str, int, bool], *values: Number) -> None:
        detached = tuple(x.detach().to(self.device) if isinstance(x, Tensor) else x for x in values)
        self.waiting.setdefault(key, []).append(detached)
        self.calls += 1
        if self.calls >= self.MOST:
            self._sum_waiting()

    def _column(self, values: tuple[Number, ...]) -> Tensor:
        """All elements of the values in one vector, on the device."""
        if not any(isinstance(value, Tensor) for value in values):
            return torch.tensor(values, dtype=torch.float64).to(self.device, non_blocking=True)
        double = partial(torch.tensor, dtype=torch.float64, device=self.device)
        return torch.cat([x.reshape(-1) if isinstance(x, Tensor) else double([x]) for x in values])

    def _sum_waiting(self) -> None:
        """Add the waiting values to the sums, in the order in which they came."""
        for (name, bins, has_count), calls in self.waiting.items():
            totals, *rest = map(self._column, zip(*calls, strict=True))  # rest: the counts, the times or nothing
            counts = rest[0] if has_count else totals.isfinite()
            totals = totals if has_count else totals.where(counts, 0)
            place = (rest[0] * bins).long().clamp(0, bins - 1) if bins else torch.zeros_like(totals).long()
            names = [f'{name}_{i / bins:.1f}_{(i + 1) / bins:.1f}' for i in range(bins)] or [name]
            zeros = torch.zeros(2, dtype=torch.float64, device=self.device)
            table = torch.stack([self.sums.get(key, zeros) for key in names])  # (bins or 1, 2)
            for column, new in enumerate((totals, counts)):
                table[:, column].index_add_(0, place, new.double())
            self.sums |= zip(names, table, strict=True)
        self.waiting, self.calls = {}, 0

    def over_ranks(self) -> dict[str, Tensor]:
        """[sum, count] by name over all ranks, on the CPU. Ranks may have logged different names."""
        self._sum_waiting()
        names = sorted({name for on_rank in ranks.all_gather_objects(list(self.sums)) for name in on_rank})
        if not names:
            return {}
        zeros = torch.zeros(2, dtype=torch.float64, device=self.device)
        table = torch.stack([self.sums.get(name, zeros) for name in names])
        return dict(zip(names, ranks.all_reduce(table).cpu(), strict=True))  # CPU-GPU sync

    def means(self) -> dict[str, float]:
        """The mean of each name with a count, to seven digits: further digits depend on the order of summation."""
        pairs = {name: pair.tolist() for name, pair in self.over_ranks().items()}
        return {name: float(f'{total / count:.7g}') for name, (total, count) in pairs.items() if count > 0}

    def here(self, name: str) -> float:
        """The mean on this rank, NaN if there is none. No communication."""
        self._sum_waiting()
        total, count = self.sums[name].tolist() if name in self.sums else (0.0, 0.0)  # CPU-GPU sync
        return total / count if count else math.nan

    def load(self, sums: dict[str, Tensor]) -> None:
        """Continue from the sums that `over_ranks` returned for a checkpoint."""
        self.clear()  # the sums cover all ranks together, so only rank 0 takes them
        self.sums = {name: pair.to(self.device) for name, pair in sums.items()} if ranks.is_main() else {}
