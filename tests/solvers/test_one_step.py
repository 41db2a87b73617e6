"""Adaptive steps: tolerance, cost, ends. test_table.py tests the order of the other solvers."""

import itertools

import pytest
import torch

from sampling import sample
from solvers import SOLVERS
from tests.oracle import RING, at, base_noise, exact_predict, process_named
from tests.solvers.each import each_process


@each_process
def test_adaptive_steps_keep_their_tolerance(process_name):
    process = process_named(process_name)
    model_fn = RING.as_model('velocity', process)
    fine = sample(model_fn, process, base_noise(50), solver='rk4', num_steps=500)
    coarse = sample(model_fn, process, base_noise(50), solver='dopri5', num_steps=1)
    assert 1e-9 < (coarse - fine).square().mean().sqrt() < 1e-3


@each_process
def test_an_adaptive_step_continues_from_the_previous_one(process_name):
    """A grid step neither repeats the last evaluation nor searches for a step size again; the result is as exact."""
    process, method = process_named(process_name), SOLVERS['dopri5']
    model_fn, x1, n = RING.as_model('x0', process), base_noise(50), 12
    calls, ends = [], []

    def counted(xt, t, label):
        calls.append(t[0].item())
        return model_fn(xt, t, label)

    x = sample(
        counted,
        process,
        x1,
        solver='dopri5',
        num_steps=n,
        model_type='x0',
        callback=lambda i, s, x: ends.append((s, len(calls))),
    )
    fresh_calls, y, t = 0, at(process, 0.999).sigma * x1, 0.999
    for s, _ in ends:
        predict = exact_predict(process, RING)  # a new one, which knows nothing about the previous step
        y, t = method.step(y, t, s, predict, None), s
        fresh_calls += predict.nfe
    assert len(calls) <= fresh_calls - 6 * (n - 1)  # saves the evaluation, and more for the step sizes
    for (s, number), (_, following) in itertools.pairwise(ends):
        assert calls[number - 1] == pytest.approx(s, abs=1e-12) and (following - number) % 6 == 0  # 6 per attempt
    fine = sample(model_fn, process, x1, solver='rk4', num_steps=500, model_type='x0')
    assert (x - fine).square().mean().sqrt() < 1e-3


def test_an_adaptive_step_from_elsewhere_asks_for_its_velocity():
    process, step = process_named('rf'), SOLVERS['dopri5'].step
    used, new = (exact_predict(process, RING) for _ in range(2))
    step(base_noise(5), 0.9, 0.6, used, None)
    x = base_noise(10)[5:]
    torch.testing.assert_close(step(x, 0.6, 0.3, used, None), step(x, 0.6, 0.3, new, None), rtol=0, atol=0)


def test_values_that_are_not_finite_stay_so():
    """torchdiffeq would end in an AssertionError about its step size."""
    x = sample(lambda x, t, label=None: x * torch.nan, process_named('rf'), base_noise(3), solver='dopri5')
    assert x.isnan().all()
