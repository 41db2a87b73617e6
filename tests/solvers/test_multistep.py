"""Multistep methods: published formulas, invariance of the path, weights for Gaussian data, the default."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from sampling import sample
from solvers import SOLVERS, TIME_GRIDS, Multistep, angular, gaussian
from tests.oracle import F64, RING, at, base_noise, exact_predict, process_named, random_mixture
from tests.solvers.each import each_process

MULTISTEP = [name for name, solver in SOLVERS.items() if isinstance(solver.step, Multistep)]
SMOOTH = random_mixture(2, 3, seed=4, smallest=0.3, largest=0.5)


@each_process
@pytest.mark.parametrize('solver', [name for name in MULTISTEP if not SOLVERS[name].stochastic])
def test_multistep_is_the_same_on_all_paths(solver, process_name):
    """On the same log-SNRs, methods in the log-SNR or the angle give the same on every process; Euler does not."""
    trained, other = process_named('rf'), process_named(process_name)
    other_model = RING.as_model('velocity', other)
    t_max, t_min = other.time_of_log_snr(trained.log_snr(torch.tensor([0.98, 0.02], dtype=F64))).tolist()
    x = sample(
        RING.as_model('velocity', trained), trained, base_noise(20), solver=solver, num_steps=12, t_min=0.02, t_max=0.98
    )
    start, end = at(other, t_max), at(other, t_min)
    x1 = base_noise(20) * 0.98 / math.hypot(0.98, 0.02) * torch.hypot(start.alpha, start.sigma) / start.sigma
    y = sample(other_model, other, x1, solver=solver, num_steps=12, t_min=t_min, t_max=t_max)
    torch.testing.assert_close(y / torch.hypot(end.alpha, end.sigma), x / math.hypot(0.02, 0.98), rtol=1e-6, atol=1e-8)


def dpm_solver(model_fn, process, x1, times, order):
    """DPM-Solver++ for x0 by divided differences (Lu et al. 2022b, section 4), written independently."""
    alpha, sigma = process.alpha(times), process.sigma(times)
    lam = (alpha / sigma).log()
    x, past = sigma[0] * x1, []
    for i in range(len(times) - 1):
        past.insert(0, model_fn(x, times[i].expand(len(x)), None))
        h = lam[i + 1] - lam[i]
        phi_1, phi_2 = -torch.expm1(-h), h - 1 + (-h).exp()
        phi_3 = h**2 / 2 - phi_2
        change = phi_1 * past[0]
        if order > 1 and i > 0:
            r0 = lam[i] - lam[i - 1]
            d0 = (past[0] - past[1]) / r0
            first = d0
            if order > 2 and i > 1:
                r1 = lam[i - 1] - lam[i - 2]
                d1 = (past[1] - past[2]) / r1
                second = (d0 - d1) / (r0 + r1)
                first = d0 + r0 * second
                change = change + 2 * phi_3 * second
            change = change + phi_2 * first
        x = sigma[i + 1] / sigma[i] * x + alpha[i + 1] * change
    return x


@each_process
@pytest.mark.parametrize(('solver', 'order'), [('ddim', 1), ('dpmpp_2m', 2), ('dpmpp_3m', 3)])
def test_exponential_methods_are_the_published_ones(solver, order, process_name):
    process, n = process_named(process_name), 9
    model_fn = RING.as_model('x0', process)
    times = TIME_GRIDS['logistic'](process, 0.999, 0.001, n)
    x = sample(model_fn, process, base_noise(20), solver=solver, num_steps=n, model_type='x0')
    torch.testing.assert_close(x, dpm_solver(model_fn, process, base_noise(20), times, order), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(('solver', 'lower', 'num_steps'), [('dpmpp_2m', 'ddim', 2), ('dpmpp_3m', 'dpmpp_2m', 3)])
def test_a_value_at_infinite_noise_is_not_looked_back_at(solver, lower, num_steps):
    """At t = 1 the log-SNR is infinite: the first step has no past that it could use, and the second only one value.

    The mean of the data is not 0: it is the value there.
    """
    process = process_named('rf')
    settings = dict(process=process, x1=base_noise(20), model_type='x0', t_max=1.0, num_steps=num_steps)
    x, y = (sample(SMOOTH.as_model('x0', process), **settings, solver=name) for name in (solver, lower))
    torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@each_process
@pytest.mark.parametrize('times', [(0.9, 0.6), (0.8, 0.9, 0.4), (0.3, 0.6, 0.95, 0.1)], ids=len)
def test_weights_for_gaussian_data_have_the_least_error(times, process_name):
    """At the least mean square, the errors at the end are orthogonal to every term of the sum.

    Paths, predictions and the growth of an error are found by following the ODE of Gaussians of 32 widths.
    """
    process, (*nodes, s), start = process_named(process_name), times, 0.96
    std = 0.5 * torch.tensor(np.geomspace(1 / 20, 2.5, 32))

    def follow(x, t, s, n=1000):
        c = process(torch.linspace(t, s, 2 * n + 1, dtype=F64)[:, None])
        rate = (c.alpha * c.alpha_dot * std**2 + c.sigma * c.sigma_dot) / (c.alpha**2 * std**2 + c.sigma**2)
        h = (s - t) / n
        for first, middle, last in zip(rate[0:-2:2], rate[1:-1:2], rate[2::2], strict=True):
            k1 = first * x
            k2 = middle * (x + h / 2 * k1)
            k3 = middle * (x + h / 2 * k2)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + last * (x + h * k3))
        return x

    def x0(x, t):
        c = at(process, t)
        return c.alpha * std**2 / (c.alpha**2 * std**2 + c.sigma**2) * x

    x = {t: follow(torch.ones(32, dtype=F64), start, t) for t in (*nodes, s)}
    x = {t: std * xt / follow(x[s], s, 1e-4, 4000) for t, xt in x.items()}  # the paths that end at std
    mean = [at(process, nodes[0]).alpha, *[torch.ones(1, dtype=F64) for _ in nodes]]
    terms = [torch.cat(pair) for pair in zip([x[nodes[0]], *(x0(x[t], t) for t in nodes)], mean, strict=True)]
    wanted = torch.cat([x[s], at(process, s).alpha])
    growth = torch.cat([std, torch.ones(1)]) / wanted
    level = exact_predict(process, RING).level
    a, b = gaussian(level(nodes[0]), level(s), tuple(map(level, nodes)), 0.0, sigma_data=0.5)
    errors = growth * (sum(w * term for w, term in zip((a, *b), terms, strict=True)) - wanted)
    cosines = torch.stack([(growth * term) @ errors / (growth * term).norm() / errors.norm() for term in terms])
    assert errors.norm() > 1e-4 and cosines.abs().max() < 1e-3, (errors.norm(), cosines)


@pytest.mark.parametrize(
    ('n', 'formula', 'predicted', 'corrected'),
    [
        (11, angular, [1, 2, 3, *[4] * 6, 3, 2], [2, 3, 4, *[5] * 7]),
        (10, gaussian, [1, 2, *[3] * 8], [2, *[3] * 8]),
    ],
)
def test_how_far_the_steps_of_the_default_look_back(n, formula, predicted, corrected, monkeypatch):
    seen, adams = [], SOLVERS['adams']
    step = 'step' if formula is angular else 'few'
    assert getattr(adams, step).formula is formula

    def counted(here, there, nodes, *others):
        seen.append(len(nodes))
        return formula(here, there, nodes, *others)

    given = {step: dataclasses.replace(getattr(adams, step), formula=counted)}
    monkeypatch.setitem(SOLVERS, 'adams', dataclasses.replace(adams, **given))
    process = process_named('rf')
    sample(RING.as_model('velocity', process), process, base_noise(3), num_steps=n)
    assert (seen[::2], seen[1::2]) == (predicted, corrected)
