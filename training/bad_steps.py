"""Steps whose loss or gradient is not finite are skipped and counted; too many in a row end the run."""

from collections.abc import Callable

import torch
from torch import Tensor

from config import Config
from runtime.errors import NonFiniteLoss
from runtime.ranks import print_once


class BadSteps:
    """Counts the steps that were skipped. Decides on the device, without a CPU-GPU sync, and the same on every rank."""

    def __init__(self, config: Config, device: torch.device):
        self.config = config
        # (skipped in a row, skipped in total, step number of the last skip)
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self.reported = 0  # how many of them have been printed

    @staticmethod
    def poison(losses: Tensor) -> Tensor:
        """The mean of losses (B,), or NaN if one is not finite: then every gradient is NaN, on every rank."""
        return losses.mean() * torch.where(losses.detach().isfinite().all(), 1.0, torch.nan)

    def check(self, grad_norm: Tensor, step: int) -> Tensor:
        """Whether the step may be taken, a 0-dimensional bool tensor; counts it if not. After max_bad_steps in a row
        every step is skipped, until `raise_if_too_many` is called."""
        in_a_row, in_total, last = self.counts
        ok = grad_norm.isfinite() & (in_a_row < self.config.max_bad_steps)
        self.counts = torch.stack([torch.where(ok, 0, in_a_row + 1), in_total + ~ok, torch.where(ok, last, step)])
        return ok

    def raise_if_too_many(self) -> None:
        """Raise NonFiniteLoss, on every rank, if too many steps in a row were bad."""
        in_a_row, _, last = self.counts.tolist()  # CPU-GPU sync
        if in_a_row >= self.config.max_bad_steps:
            raise NonFiniteLoss(
                f'the loss or its gradient was not finite in max_bad_steps={self.config.max_bad_steps} steps in a row, '
                f'from step {last - in_a_row + 1} on. They were skipped, so the weights are finite; the last '
                f'checkpoint is in {self.config.run_dir}. docs/reliability.md explains how to replay a step. '
                'Try a lower --base_lr, or --precision float32.'
            )

    def report(self, alert: Callable[[str, str], None] = lambda kind, text: None) -> int:
        """The total number of skipped steps. Prints new ones and passes them to `alert`. Raises NonFiniteLoss."""
        self.raise_if_too_many()
        _, total, last = self.counts.tolist()  # CPU-GPU sync
        if total > self.reported:
            new = f'skipped {total - self.reported} of the last steps, most recently step {last}'
            print_once(f'{new}: loss or gradient not finite')
            alert('steps were skipped', f'{new}: loss or gradient not finite')
        self.reported = total
        return total

    def state_dict(self) -> Tensor:
        return self.counts

    def load_state_dict(self, counts: Tensor) -> None:
        self.counts = counts.to(self.counts.device)
        self.reported = int(counts[1])
