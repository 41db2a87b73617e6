"""Cost, times, ends and settings of every sampler. Entries that you add to the tables are tested too."""

import dataclasses
import gc
import inspect
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config import Config, SettingError
from prediction import ROWS
from sampling import TIME_GRIDS, get_sample_fn, sample
from solvers import LAST_STEPS, SDE_NOISES, SOLVERS, Multistep, Noise, Steps, path
from tests.oracle import ALL_PROCESSES, RING, GaussianMixture, at, base_noise, exact_predict, process_named

SDE = [name for name, solver in SOLVERS.items() if solver.stochastic]
FIXED = [name for name, solver in SOLVERS.items() if solver.nfe]
each_solver = pytest.mark.parametrize('solver', SOLVERS)
each_grid = pytest.mark.parametrize('time_grid', TIME_GRIDS)
each_process = pytest.mark.parametrize('process_name', ALL_PROCESSES)
each_noise = pytest.mark.parametrize('sde_noise', SDE_NOISES)
STEPS_IN_T = [name for name, solver in SOLVERS.items() if not isinstance(solver.step, Multistep)]


# ---------------------------------------------------------------- cost, times, ends


@pytest.mark.parametrize('solver', FIXED)
@each_process
@each_grid
@pytest.mark.parametrize('num_steps', [1, 7])
def test_steps_evaluations_and_times(solver, process_name, time_grid, num_steps):
    process, model_times, steps = process_named(process_name), [], []

    def model_fn(xt, t, label):
        assert t.shape == (3,) and t.dtype == xt.dtype and (t == t[0]).all()
        model_times.append(t[0].item())
        return torch.zeros_like(xt)

    settings = dict(solver=solver, time_grid=time_grid, t_min=0.01, t_max=0.9)
    x = sample(
        model_fn,
        process,
        torch.randn(3, 1, 4, 5),
        num_steps=num_steps,
        callback=lambda i, t, x: steps.append((i, t, x)),
        **settings,
    )
    assert len(model_times) == num_steps * SOLVERS[solver].nfe
    start = Steps(solver, t_min=0.01, t_max=0.9).start(process, 'velocity')
    assert start == 0.9 or (process_name, round(start, 3)) == ('linear_vp', 0.882)
    assert model_times[0] == pytest.approx(start) and min(model_times) >= 0.01 - 1e-8 and max(model_times) <= 0.9 + 1e-7
    numbers, times, states = zip(*steps, strict=True)
    assert numbers == tuple(range(1, num_steps + 1))
    assert (
        list(times) == sorted(times, reverse=True) and len(set(times)) == num_steps and times[-1] == pytest.approx(0.01)
    )
    assert torch.equal(states[-1], x) and x.shape == (3, 1, 4, 5) and x.dtype == torch.float32 and x.isfinite().all()


@pytest.mark.parametrize('solver', FIXED)
@pytest.mark.parametrize('nfe', [4, 11, 50])
def test_as_many_evaluations_as_requested(solver, nfe):
    calls = []
    sample(
        lambda xt, t, label: calls.append(t) or 0 * xt,
        process_named('rf'),
        torch.zeros(1, 1, 1, 1),
        solver=solver,
        nfe=nfe,
    )
    assert nfe - SOLVERS[solver].nfe < len(calls) <= nfe


def test_start_is_the_noise_of_t_max():
    started = []
    sample(
        lambda xt, t, label: started.append(xt) or 0 * xt,
        process_named('ve'),
        torch.ones(1, 1, 1, 1),
        solver='euler',
        num_steps=1,
        t_max=1.0,
    )
    assert started[0].item() == pytest.approx(80)


@pytest.mark.parametrize('process_name', ['rf', 'cosine', 've'])
@pytest.mark.parametrize(
    ('solver', 'sde_noise'), [(s, n) for s in FIXED for n in (SDE_NOISES if s in SDE else ['natural'])]
)
@pytest.mark.parametrize('time_grid', ['uniform', 'cosine', 'logistic'])
def test_whole_range_is_finite(process_name, solver, sde_noise, time_grid):
    """From alpha = 0 to sigma = 0, no sampler diverges, whatever the noise.

    With rf the natural noise is infinite at t = 1 and the constant noise at t = 0.
    """
    if process_name == 've' and time_grid != 'uniform' and solver in STEPS_IN_T:
        pytest.skip('the first of these steps spans most of the noise: not for a solver in t')
    process = process_named(process_name)
    torch.manual_seed(0)
    x = sample(
        RING.as_model('v', process),
        process,
        base_noise(200),
        model_type='v',
        solver=solver,
        nfe=80,
        sde_noise=sde_noise,
        t_min=0.0,
        t_max=1.0,
        time_grid=time_grid,
    )
    assert x.isfinite().all()
    assert 0.8 < x.norm(dim=1).median() < 1.2


@each_noise
def test_no_noise_is_the_ode(sde_noise):
    process = process_named('cosine')
    for sde, ode in (('euler_maruyama', 'euler'), ('sde_dpmpp_2m', 'dpmpp_2m')):
        a, b = (
            sample(
                RING.as_model('v', process),
                process,
                base_noise(50),
                model_type='v',
                solver=s,
                sde_noise=sde_noise,
                sde_noise_scale=0.0,
                num_steps=1,
            )
            for s in (ode, sde)
        )
        assert not torch.equal(a, b)  # the last step, the only one here, is the posterior mean
        steps = [
            SOLVERS[s].step(
                base_noise(50), 0.6, 0.5, exact_predict(process, RING, 1), Noise(SDE_NOISES[sde_noise], 0.0)
            )
            for s in (ode, sde)
        ]
        torch.testing.assert_close(*steps)


def test_last_steps():
    process, ends = process_named('rf'), {}
    for name in LAST_STEPS:
        ends[name] = sample(
            RING.as_model('x0', process),
            process,
            base_noise(5),
            model_type='x0',
            solver='euler_maruyama',
            num_steps=1,
            sde_last_step=name,
            t_min=0.3,
            t_max=0.9,
        )
    truth = RING.prediction(0.9 * base_noise(5), at(process, 0.9, 5))
    torch.testing.assert_close(ends['mean'], truth.x0)
    torch.testing.assert_close(ends['ode'], 0.7 * truth.x0 + 0.3 * truth.x1)


@each_solver
def test_only_stochastic_solvers_draw_noise_and_never_in_the_last_step(solver):
    process = process_named('rf')

    def equal(num_steps):
        x, y = (
            sample(
                RING.as_model('v', process), process, base_noise(50), model_type='v', solver=solver, num_steps=num_steps
            )
            for _ in range(2)
        )
        return torch.equal(x, y)

    assert equal(1)
    assert equal(5) != SOLVERS[solver].stochastic


@pytest.mark.parametrize('model_type', ROWS)
@each_process
def test_every_model_type_gives_the_same_samples(model_type, process_name, monkeypatch):
    """The exact models agree, so on the same times the SDE's samples agree too, up to rounding."""
    monkeypatch.setattr(path, 'LARGEST_ERROR', float('inf'))
    process = process_named(process_name)

    def samples(model_type):
        torch.manual_seed(0)
        return sample(
            RING.as_model(model_type, process),
            process,
            base_noise(100),
            model_type=model_type,
            solver='sde_dpmpp_2m',
            num_steps=50,
        )

    torch.testing.assert_close(samples(model_type), samples('x0'), rtol=1e-6, atol=1e-6)


@each_solver
def test_single_precision_is_enough(solver):
    """Networks work in float32. Coefficients are computed in float64, so only the images are rounded."""
    process, steps = process_named('rf'), dict(num_steps=2 if SOLVERS[solver].nfe is None else 30)
    torch.manual_seed(0)
    x1 = base_noise(50).float()
    single = sample(RING.as_model('velocity', process), process, x1, solver=solver, **steps, sde_noise_scale=0.0)
    double = sample(
        RING.as_model('velocity', process), process, x1.double(), solver=solver, **steps, sde_noise_scale=0.0
    )
    assert single.dtype == torch.float32
    assert (single - double).abs().median() < (1e-5 if SOLVERS[solver].nfe else 1e-4)


# ---------------------------------------------------------------- errors


def refused(match, **settings):
    with pytest.raises(SettingError, match=match):
        sample(lambda xt, t, label: xt, process_named('rf'), torch.zeros(2, 1, 1, 1), **settings)


@pytest.mark.parametrize('setting', ['solver', 'time_grid', 'sde_noise', 'sde_last_step', 'model_type'])
def test_unknown_choice_lists_the_choices(setting):
    refused(rf"{setting}='nonsense'.*Choose one of: \w+, \w+", **{setting: 'nonsense'})


@pytest.mark.parametrize(
    ('settings', 'match'),
    [
        (dict(num_steps=0), 'num_steps=0'),
        (dict(nfe=-5), 'nfe=-5'),
        (dict(t_min=0.9, t_max=0.1), r't_min=0.9, t_max=0.1.*t_min < t_max'),
        (dict(t_max=1.5), r't_max=1.5.*<= 1'),
    ],
)
def test_values_that_make_no_sense_are_refused(settings, match):
    refused(match, **settings)


def test_nothing_of_a_sample_outlives_it():
    """No reference cycle keeps images in GPU memory until the garbage collector runs."""
    kept = []

    def model_fn(xt, t, label):
        kept.append(weakref.ref(xt))
        return torch.zeros_like(xt)

    gc.disable()
    try:
        sample(model_fn, process_named('rf'), torch.zeros(1, 1, 2, 2), num_steps=8)
        assert len(kept) == 8 and not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    'settings',
    [
        dict(model_type='x1', t_max=1.0),
        dict(model_type='x0', t_min=0.0, solver='heun'),
        dict(model_type='score', t_max=1.0),
    ],
)
def test_singular_end_is_refused(settings):
    refused(f"'{settings['model_type']}' cannot give the .* at t=", time_grid='uniform', **settings)


def test_singular_end_of_the_other_process_is_refused():
    refused(
        'cannot give the velocity at t=0',
        model_type='v',
        t_min=0.0,
        solver='heun',
        time_grid='uniform',
        sampling_process=process_named('linear_vp'),
    )


def test_time_keeps_its_digits_next_to_bfloat16_images():
    times = []
    sample(
        lambda xt, t, label: times.append(t[0].item()) or 0 * xt,
        process_named('rf'),
        torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16),
        num_steps=2,
    )
    assert times[0] == pytest.approx(0.999, abs=1e-6)


def test_an_end_that_the_solver_never_looks_at_is_not_refused():
    process = process_named('rf')
    x = sample(
        RING.as_model('x0', process), process, base_noise(20), model_type='x0', solver='ddim', t_min=0.0, t_max=1.0
    )
    assert x.isfinite().all()


def test_settings_are_checked_before_there_is_anything_to_sample():
    for bad in (dict(solver='rk4', sample_nfe=3), dict(time_grid='log_snr', t_min=0.0)):
        with pytest.raises(SettingError):
            get_sample_fn(Config(**bad), process_named('rf'), null_label=10)


def test_a_notebook_samples_as_a_run_does():
    """Every setting that `sample` shares with the config has the config's default."""
    renamed = {'num_steps': 'num_sample_steps', 'nfe': 'sample_nfe'}
    parameters = {renamed.get(name, name): p.default for name, p in inspect.signature(sample).parameters.items()}
    shared = {name: value for name, value in dataclasses.asdict(Config()).items() if name in parameters}
    assert len(shared) == 13 and {name: parameters[name] for name in shared} == shared


def test_config_reaches_the_sampler():
    config = Config(solver='heun', sample_nfe=8, label_dropout=0.1, guidance_scale=3.0, guidance_interval=(0.0, 0.5))
    calls = []
    fn = get_sample_fn(config, process_named('rf'), null_label=7)
    fn(lambda xt, t, label: calls.append(label) or 0 * xt, x1=torch.zeros(1, 1, 2, 2), label=torch.tensor([3]))
    assert len(calls) == 8 and {tuple(label.tolist()) for label in calls} == {(3,), (3, 7)}


class Copies(TorchDispatchMode):
    """Counts tensors that are copied to another device, or that hold a number from the CPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        came_from = {x.device.type for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.device.type == 'meta' and 'cpu' in came_from:
            self.count += 1
        return out


@pytest.mark.parametrize('sampling_process', [None, process_named('ve')], ids=['same', 'other'])
@pytest.mark.parametrize('solver', FIXED)
def test_an_evaluation_copies_nothing_to_the_device(solver, sampling_process):
    """A copy from the CPU makes it wait for the GPU. A tensor on `meta` stands for one on a GPU."""
    x1, label = torch.zeros(2, 1, 4, 4, device='meta'), torch.zeros(2, dtype=torch.int64, device='meta')
    settings = dict(solver=solver, num_steps=5, guidance_scale=2.0, null_label=3, sampling_process=sampling_process)
    cond = dict(cond={'ink': torch.zeros(2, device='meta')}, null_cond={'ink': 0.5})
    with Copies() as copies:
        x = sample(lambda xt, t, label, ink: xt * ink.mean(), process_named('rf'), x1, label, **settings, **cond)
    assert x.device.type == 'meta' and copies.count == 0
    with Copies() as copies:
        at(process_named('rf'), 0.5).alpha.to(x1)
    assert copies.count > 0  # so that a copy would have been seen


@each_solver
def test_data_may_be_single_numbers(solver):
    """Data of shape (B,), with guidance_rescale, although a single number has no standard deviation."""
    process = process_named('cosine')
    mixture = GaussianMixture(torch.tensor([[0.4]]), torch.tensor([[[0.3**2]]]))

    def model_fn(xt, t, label):
        return mixture.as_model('v', process)(xt[:, None], t, label)[:, 0]

    torch.manual_seed(0)
    settings = dict(model_type='v', solver=solver, num_steps=60, guidance_rescale=0.5)
    guide = dict(guide_fn=lambda xt, t, label: 0 * xt, guidance_scale=1.0 + 1e-9)
    x = sample(model_fn, process, base_noise(2000, 1)[:, 0], **settings, **guide)
    assert x.shape == (2000,) and x.mean() == pytest.approx(0.4, abs=0.03) and x.std() == pytest.approx(0.3, abs=0.02)


def test_no_gradient_is_recorded():
    weight = torch.ones(1, requires_grad=True)
    assert not sample(
        lambda xt, t, label: weight * xt, process_named('rf'), torch.ones(1, 1, 2, 2), num_steps=2
    ).requires_grad


@pytest.mark.parametrize(
    ('solver', 'nfe', 'words'),
    [
        ('rk4', 3, r'nfe=3 \(--sample_nfe\).*which needs at least 4 evaluations a step. Use 4 or more'),
        ('dopri5', 40, 'which needs as many evaluations as its tolerance asks for. Set a number of steps'),
    ],
)
def test_too_few_evaluations_are_refused_with_what_the_solver_needs(solver, nfe, words):
    with pytest.raises(SettingError, match=words):
        sample(None, process_named('rf'), torch.zeros(1, 2), solver=solver, nfe=nfe)
