"""Conclusions from the first images: whether x0 and x1 are independent, and whether x0 has the expected scale."""

from torch import Tensor

from runtime.ranks import print_once
from training.batches import Batches
from training.experiment import Experiment


def independence(experiment: Experiment, batches: Batches) -> bool:
    """Whether x1 is the process's base, drawn independently of x0: as the experiment says, or as its first images show.
    Prints what it finds."""
    seen, name = signs_of_dependence(experiment, batches), type(experiment).__name__
    if experiment.independent is not None:
        if experiment.independent and seen:
            print_once(
                f'warning: {name}.independent is True, but {seen}. Samples start from noise and SDE solvers follow a '
                'wrong score. Set independent = False.'
            )
        return experiment.independent
    if seen:
        print_once(
            f'{name}.independent is False, because {seen}: samples start from x1 of held-out data, and there are no '
            'SDE samples. Set `independent` in the class to decide this yourself.'
        )
    return not (seen or experiment.couple is not None or batches.train_loader.has_pairs)


def signs_of_dependence(experiment: Experiment, batches: Batches) -> str | None:
    """The reason why x1 of the first images cannot be an independent draw from the process's base, or None.

    Two preparations of the same images are compared: where x1 is made of x0, it is alike in both.
    """
    x0, x1, second_x1 = batches.example.x0, batches.example.x1, batches.draw_example('again').x1
    if not x1.is_floating_point() or len(x1) < 8 or x1.shape != second_x1.shape:
        return None
    first, second = ((x - x.mean(0)).flatten(1).double() for x in (x1, second_x1))
    products = (first * second).sum(1)  # (n,), of mean 0 if the two are independent
    if products.mean() > 5 * products.std() / len(products) ** 0.5:
        correlation = float(products.sum() / (first.norm() * second.norm()))
        return f'x1 goes with x0 (two draws of x1 for the same images correlate by {correlation:.2f})'
    base = experiment.process.sample_base(x0)
    (mean, std), (base_mean, base_std) = ((float(x.mean()), float(x.std())) for x in (x1, base))
    chance = max(0.05, 5 / x1.numel() ** 0.5)
    if abs(mean - base_mean) > chance * base_std or abs(std / base_std - 1) > chance:
        return (
            f'x1 has mean {mean:.2f} and standard deviation {std:.2f}, and the base of process '
            f'{experiment.config.process_name!r} has {base_mean:.2f} and {base_std:.2f}'
        )
    return None


def scale_warning(x0: Tensor, sigma_data: float) -> str | None:
    """Why x0 (B, ...) of the first images looks wrong, with the numbers and the remedy, or None."""
    if not x0.is_floating_point():
        return None
    finite = x0[x0.isfinite()]
    bad = x0.numel() - finite.numel()
    low, high = (float(v) for v in finite.aminmax()) if finite.numel() else (float('nan'), float('nan'))
    numbers = f'x0 of the first {len(x0)} images lies in [{low:.4g}, {high:.4g}]'
    if bad:
        return f'{numbers}, and {bad} of its {x0.numel()} values are not finite. Fix the data, or override encode.'
    if low == high:
        return f'x0 of the first {len(x0)} images is {low:.4g} everywhere. Look at the data, and at encode.'
    std = float(finite.double().std())
    as_assumed = 0.8 < std / sigma_data < 1.25 and abs(float(finite.mean())) < sigma_data and high - low < 20 * std
    if (low < -1.5 or high > 1.5) and not as_assumed:
        return (
            f'{numbers}, standard deviation {std:.3g}. The defaults (sigma_data={sigma_data:g}, the time grid) are '
            'made for data in [-1, 1]: override encode and decode, e.g. with '
            f'(x - {float(finite.mean()):.3g}) / {2 * std:.3g} and its inverse, or set --sigma_data {std:.3g}.'
        )
    return None
