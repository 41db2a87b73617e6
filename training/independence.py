"""Tests, on the first images, whether x1 is the process's base, drawn independently of x0. This decides what samples
start from, and whether the network knows the score, which SDE solvers and eval/reference need."""

import torch
from torch import Tensor

import utils
from config import SettingError
from processes import GaussianProcess
from runtime import ranks
from runtime.ranks import print_once
from training.batches import Batches
from training.experiment import Experiment

ENOUGH_VALUES, MOST_DRAWS = 2**16, 16  # values of x1 to test; the most draws for them, each of up to 64 images
MOST_VALUES = 2**17  # values of x1 in a summary, at most
BASES = 32  # draws of the base, which show how much its summaries vary by chance
FAR = 8.0  # a difference of more standard deviations is not chance


def independence(experiment: Experiment, batches: Batches, is_new: bool) -> bool:
    """Whether x1 is the process's base, drawn independently of x0: as the experiment declares, or as its first images
    show. Prints the finding if the run `is_new`. Raises SettingError if the experiment declares it and its images
    contradict."""
    if facts := batches.train_loader.facts:  # a run that is opened to read, whose data may be missing
        return facts['independent']
    name, claimed = type(experiment).__name__, experiment.independent
    if claimed is not None and not claimed:
        return False
    found = signs_of_dependence(experiment, batches)
    seen = ranks.on_main(lambda: found)  # one decision for all
    say = print_once if is_new else lambda text: None
    if seen and claimed and not experiment.overrides('sample_inputs'):
        raise SettingError(
            f'{name}.independent is True, but {seen}. Samples would start from another distribution than in training, '
            'and SDE solvers would follow a wrong score. Set independent = False, or leave it out; or draw this base '
            'in the sample_base of a process.'
        )
    if seen and claimed:  # the experiment's own sample_inputs decides what samples start from
        say(f'warning: {name}.independent is True, but {seen}. SDE samples and eval/reference are left out.')
        return False
    if seen:
        say(
            f'{name}.independent is False, because {seen}: samples start from x1 of held-out data, and SDE samples and '
            'eval/reference are left out. Set `independent` in the class to decide this yourself.'
        )
        return False
    paired = experiment.couple is not None or batches.train_loader.has_pairs
    if paired and not claimed:
        say(f'{name}.independent is False: x0 and x1 are paired, so samples start from x1 of held-out data.')
    elif not claimed and experiment.overrides('prepare_batch_fn'):
        say(f"{name}.independent is True: x1 of the first images looks like the process's base, drawn without x0.")
    return not paired or bool(claimed)


def signs_of_dependence(experiment: Experiment, batches: Batches) -> str | None:
    """The reason why x1 of the first images cannot be an independent draw from the process's base, or None.

    Compares two preparations of the same images: if x1 is made from x0, it is similar in both.
    """
    x1, second_x1 = batches.example.x1, batches.draw_example('again').x1
    if not x1.is_floating_point() or len(x1) < 8 or x1.shape != second_x1.shape:
        return None
    first, second = (utils.double((x - x.mean(0)).flatten(1)) for x in (x1, second_x1))
    products = (first * second).sum(1)  # (n,), of mean 0 if the two are independent
    if products.mean() > 5 * products.std() / len(products) ** 0.5:
        correlation = float(products.sum() / (first.norm() * second.norm()))
        return f'x1 depends on x0 (two draws of x1 for the same images correlate by {correlation:.2f})'
    if experiment.overrides('prepare_batch_fn') or experiment.couple is not None or batches.train_loader.has_pairs:
        wanted = min(MOST_DRAWS, -(-ENOUGH_VALUES // x1.numel()))
        draws = [x1, second_x1, *(batches.draw_example(f'again {i}').x1 for i in range(wanted - 2))]
        return unlike_base(torch.cat(draws), experiment.process, f'process {experiment.config.process_name!r}')
    return None


def base_is_normal(process: GaussianProcess, x0: Tensor) -> bool:
    """Whether the base of the process is N(0, I), as the score needs, for data like x0 (n, ...)."""
    if type(process).sample_base is GaussianProcess.sample_base:
        return True
    like, n = torch.zeros_like(x0[:1], dtype=torch.float32), max(16, min(512, ENOUGH_VALUES // x0[0].numel()))
    devices = [torch.cuda.current_device()] if torch.cuda.device_count() else []
    with torch.random.fork_rng(devices):  # the caller's random numbers do not change
        utils.seed_everything(0, 'base')
        # one by one: a base may draw antithetic pairs within a batch
        drawn = torch.cat([process.sample_base(like) for _ in range(n)])
        return unlike_base(drawn, GaussianProcess(), 'N(0, I)') is None


def unlike_base(x1: Tensor, process: GaussianProcess, name: str) -> str | None:
    """Why x1 (n, ...) cannot be draws from the base of the process, called `name`: the first number of `summary` that
    differs from the base's by more than chance. None if they all agree."""
    x1 = x1[: max(4, MOST_VALUES // x1[0].numel())]
    found, drawn = summary(x1), [summary(process.sample_base(x1)) for _ in range(BASES)]
    for key, value in found.items():
        of_base = torch.tensor([base[key] for base in drawn], dtype=torch.float64)
        mean, spread = float(of_base.mean()), float(of_base.std())
        if not abs(value - mean) <= FAR * spread + 0.01 * max(1, abs(mean)):
            return f'{key} of x1 is {value:.2f}, but {mean:.2f} for the base of {name}'
    return None


def summary(x1: Tensor) -> dict[str, float]:
    """Numbers that tell distributions of rows x1 (n, ...) apart: moments and quantiles of all values, and of the
    lengths of rows; correlations of rows, of neighbours in a row, and of the entries of rows."""
    x = x1.detach().flatten(1).cpu().double()[:, :MOST_VALUES]
    n, size = x.shape
    mean, std = float(x.mean()), float(x.std())
    unit = (x - mean) / max(std, 1e-12)
    lengths, rows = unit.square().mean(1), unit[:256]
    products = (rows @ rows.T / size**0.5).fill_diagonal_(0)  # one for each pair of rows
    columns = unit[:, :64]
    together = (columns.T @ columns / n**0.5).fill_diagonal_(0)  # one for each pair of entries
    found = {'the mean': mean, 'the standard deviation': std, 'the kurtosis': float(unit.pow(4).mean())}
    found |= {'the skewness': float(unit.pow(3).mean())}
    found |= {'the mean size, in standard deviations,': float(unit.abs().mean())}
    levels = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98], dtype=torch.float64)
    quantiles = unit.flatten()[: 2**16].quantile(levels).tolist()
    found |= {f'the {level:.0%} quantile': value for level, value in zip(levels.tolist(), quantiles, strict=True)}
    # square roots: mean squares of few numbers have long tails
    found['the spread of the sizes of samples'] = float(lengths.std())
    found['the spread of the means of samples'] = float(unit.mean(1).std()) * size**0.5
    found['the correlation of two samples'] = float(products.square().mean().sqrt())
    found['the size of the mean sample'] = float(unit.mean(0).square().mean().sqrt()) * n**0.5
    if size > 1:
        found['the correlation of neighbouring values'] = float((unit[:, 1:] * unit[:, :-1]).mean())
        found['the correlation of two values'] = float(together.square().mean().sqrt())
    return found
