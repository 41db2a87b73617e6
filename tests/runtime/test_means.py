"""Running means: equal to numpy's, bit-identical whenever they are summed, and free in a training step."""

import itertools

import numpy as np
import pytest
import torch

from runtime.means import RunningMeans

CPU = torch.device('cpu')


def test_means_match_numpy():
    rng = np.random.default_rng(0)
    batches = [
        rng.normal(5, 1, size).astype(np.float32) for size in (3, 8, 1)
    ]  # unequal, so the mean of means would be wrong
    means = RunningMeans(CPU)
    for batch in batches:
        means.add('loss', torch.from_numpy(batch).sum(), torch.tensor(float(len(batch))))
    assert means.means()['loss'] == pytest.approx(np.concatenate(batches).mean(dtype=np.float64), rel=1e-6)


def test_a_name_logged_in_some_steps_is_averaged_over_those_steps():
    means = RunningMeans(CPU)
    for step in range(10):
        means.add('always', torch.tensor(float(step)), torch.tensor(1.0))
        if step % 4 == 0:
            means.add('sometimes', torch.tensor(float(step)), torch.tensor(1.0))
        means.add('empty bin', torch.tensor(0.0), torch.tensor(0.0))
    assert means.means() == {'always': 4.5, 'sometimes': 4.0}
    means.clear()
    assert means.means() == {}


def test_a_small_term_is_not_lost_in_a_large_sum():
    means = RunningMeans(CPU)
    for value in (2.0**24, *[1.0] * 1000):  # float32 would drop each 1
        means.add('x', torch.tensor(value), torch.tensor(1.0))
    assert means.means()['x'] == pytest.approx((2**24 + 1000) / 1001, rel=1e-6)


def test_means_continue_from_a_checkpoint(tmp_path):
    whole, first, second = RunningMeans(CPU), RunningMeans(CPU), RunningMeans(CPU)
    for i, value in enumerate((0.3, 0.9, 1.7, 0.2)):
        for means in (whole, first if i < 2 else second):
            means.add('x', torch.tensor(value), torch.tensor(1.0))
        if i == 1:
            torch.save(first.over_ranks(), tmp_path / 'x.pt')
            second.load(torch.load(tmp_path / 'x.pt', weights_only=True))
    assert second.means() == whole.means()


def test_values_keep_no_graph():
    means, weight = RunningMeans(CPU), torch.ones(1, requires_grad=True)
    for _ in range(2):
        means.add('x', (3 * weight).sum(), torch.tensor(1.0))
        means.add_finite('y', 3 * weight)
        means.add_by_time('z', 3 * weight, 0.5 * weight)
        waiting = [x for calls in means.waiting.values() for call in calls for x in call if x is not None]
        assert not any(x.requires_grad for x in waiting)
        means.over_ranks()
        assert means.waiting == {} and not any(pair.requires_grad for pair in means.sums.values())


def steps_of_training(n):
    """Yield (losses, times, gradient norm), as in training; some losses are not finite."""
    generator = torch.Generator().manual_seed(0)
    for step in range(n):
        losses, t = torch.rand(2, 7 + step % 3, generator=generator)
        losses = 10.0 ** (step % 9 - 4) * losses
        if step % 5 == 2:
            losses[1], losses[3] = torch.nan, torch.inf
        yield losses, t, losses[0]


def fill(means, steps):
    for losses, t, norm in steps:
        means.add_finite('loss', losses)
        means.add_by_time('loss_t', losses, t)
        means.add_finite('norm', norm)
        means.add('total', losses[0].double() * 3, torch.tensor(3.0))
        means.add('lr', 0.1, 1)


def test_means_of_a_training_run_match_numpy():
    steps = list(steps_of_training(40))
    means = RunningMeans(CPU)
    fill(means, steps)
    losses, t = (np.concatenate([step[i].numpy() for step in steps]) for i in (0, 1))
    first = np.array([losses[0].item() for losses, _, _ in steps], np.float64)
    edges = np.arange(11) / 10
    ok = np.isfinite(losses)
    expected = dict(loss=losses[ok].mean(dtype=np.float64), norm=first.mean(), total=first.mean(), lr=0.1)
    for low, high in itertools.pairwise(edges):
        expected[f'loss_t_{low:.1f}_{high:.1f}'] = losses[ok & (t >= low) & (t < high)].mean(dtype=np.float64)
    assert means.means() == pytest.approx(expected, rel=1e-6)
    assert list(means.over_ranks()) == sorted(expected)
    counts = {name: pair[1].item() for name, pair in means.over_ranks().items()}
    assert (counts['loss'], counts['norm'], counts['total'], counts['lr']) == (ok.sum(), 40, 120, 40)


@pytest.mark.parametrize('most', [1, 2, 7, 64])
def test_sums_do_not_depend_on_when_they_are_computed(monkeypatch, most):
    """They are bit-identical for any number of waiting calls, and after saving and loading in between."""
    steps = list(steps_of_training(40))
    whole = RunningMeans(CPU)
    fill(whole, steps)
    monkeypatch.setattr(RunningMeans, 'MOST', most)
    often, saved = RunningMeans(CPU), RunningMeans(CPU)
    fill(often, steps)
    fill(saved, steps[:13])
    resumed = RunningMeans(CPU)
    fill(resumed, steps[:2])  # forgotten by load
    resumed.load(saved.over_ranks())
    fill(resumed, steps[13:])
    expected = whole.over_ranks()
    for means in (often, resumed):
        sums = means.over_ranks()
        assert sums.keys() == expected.keys()
        assert all(sums[name].equal(expected[name]) for name in sums)


def test_a_step_costs_no_arithmetic_and_the_number_of_waiting_calls_is_bounded():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operations(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names += (str(func),)
            return func(*args, **kwargs or {})

    steps, means = list(steps_of_training(600)), RunningMeans(CPU)
    with Operations() as seen:
        for losses, t, norm in steps[:100]:
            means.add_finite('loss', losses)
            means.add_by_time('loss_t', losses, t)
            means.add_finite('norm', norm)
            means.add('lr', 0.1, 1)
    assert set(seen.names) <= {'aten.detach.default'}  # detach computes nothing
    for losses, t, norm in steps:
        fill(means, [(losses, t, norm)])
        assert sum(map(len, means.waiting.values())) < RunningMeans.MOST
    assert means.sums  # some were summed


def test_numbers_and_tensors_can_share_a_name():
    means = RunningMeans(CPU)
    means.add('x', 0.1, 1)
    means.add('x', torch.tensor(0.5), torch.tensor(1.0))
    means.add('x', 1, 2)
    assert means.means() == {'x': pytest.approx(1.6 / 4, rel=1e-6)}
