import itertools

import pytest
import torch

from config import Config, SettingError
from prediction import ROWS, Prediction, check_time_range, error_factor, get_model_convert_fn, get_target_fn
from processes import PROCESSES, Coefs, GaussianProcess, get_process

each_type = pytest.mark.parametrize('model_type', ROWS)
each_process = pytest.mark.parametrize('process_name', PROCESSES)


def case(process_name, t, dtype=torch.float64):
    """t, xt, x0, x1, coefs of random images at these times."""
    process = get_process(Config(process_name=process_name))
    generator = torch.Generator().manual_seed(0)
    t = torch.as_tensor(t, dtype=dtype)
    x0, x1 = torch.randn(2, len(t), 2, 3, 4, generator=generator, dtype=dtype)
    coefs = process(t)
    return t, process.compute_xt(x0, x1, coefs), x0, x1, coefs


def image(v):
    return v[:, None, None, None]


def c_skip(c):
    """Karras et al. 2022, table 1, for any alpha."""
    return c.alpha * c.sigma_data**2 / ((c.alpha * c.sigma_data) ** 2 + c.sigma**2)


def c_out(c):
    return c.sigma * c.sigma_data / ((c.alpha * c.sigma_data) ** 2 + c.sigma**2).sqrt()


# every type by its definition
BY_HAND = {
    'x0': lambda x0, x1, c: x0,
    'x1': lambda x0, x1, c: x1,
    'score': lambda x0, x1, c: -x1 / image(c.sigma),
    'velocity': lambda x0, x1, c: image(c.alpha_dot) * x0 + image(c.sigma_dot) * x1,
    'v': lambda x0, x1, c: image(c.alpha) * x1 - image(c.sigma) * x0,
    'F': lambda x0, x1, c: (x0 - image(c_skip(c)) * (image(c.alpha) * x0 + image(c.sigma) * x1)) / image(c_out(c)),
}


@each_process
@pytest.mark.parametrize('target_type', BY_HAND)
def test_target(process_name, target_type):
    t, xt, x0, x1, coefs = case(process_name, [0.1, 0.5, 0.9])
    target = getattr(get_target_fn()(t, xt, x0, x1, coefs), target_type)
    torch.testing.assert_close(target, BY_HAND[target_type](x0, x1, coefs))


def test_score_is_the_gradient_of_the_log_density():
    t, xt, x0, x1, coefs = case('rf', [0.3, 0.7])
    xt.requires_grad_()
    density = torch.distributions.Normal(image(coefs.alpha) * x0, image(coefs.sigma))
    (gradient,) = torch.autograd.grad(density.log_prob(xt).sum(), xt)
    torch.testing.assert_close(get_target_fn()(t, xt, x0, x1, coefs).score, gradient)


@each_process
def test_velocity_is_the_time_derivative(process_name):
    h, t = 1e-6, torch.tensor([0.2, 0.8], dtype=torch.float64)
    _, above, *_ = case(process_name, t + h)
    _, below, *_ = case(process_name, t - h)
    t, xt, x0, x1, coefs = case(process_name, t)
    torch.testing.assert_close(
        get_target_fn()(t, xt, x0, x1, coefs).velocity, (above - below) / (2 * h), rtol=1e-5, atol=1e-6
    )


@each_process
@each_type
@pytest.mark.parametrize('target_type', ROWS)
def test_every_conversion(process_name, model_type, target_type):
    t, xt, x0, x1, coefs = case(process_name, [0.05, 0.2, 0.5, 0.8, 0.95])
    truth = get_target_fn()(t, xt, x0, x1, coefs)
    convert, back = get_model_convert_fn(model_type), get_model_convert_fn(target_type)
    there = getattr(convert(getattr(truth, model_type), t, xt, coefs), target_type)
    torch.testing.assert_close(there, getattr(truth, target_type), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        getattr(back(there, t, xt, coefs), model_type), getattr(truth, model_type), rtol=1e-10, atol=1e-10
    )


@each_process
@each_type
@pytest.mark.parametrize('target_type', ROWS)
@pytest.mark.parametrize('t', [1e-3, 1e-2, 0.1, 0.9, 0.99, 0.999])
def test_single_precision_towards_the_ends(process_name, model_type, target_type, t):
    """In float32 the error is below 8 roundings, each 2^-24 of the terms that are added.

    With y -> p xt + q y exact in float64, these are |p xt| + |q y|: near an end where an output says little about the
    target, they are much larger than the target, and no arithmetic in float32 does better.
    """
    time, xt, x0, x1, coefs = case(process_name, [t])
    y = getattr(get_target_fn()(time, xt, x0, x1, coefs), model_type)
    convert = get_model_convert_fn(model_type)
    zero = torch.zeros_like(xt)
    exact = getattr(convert(y.float().double(), time, xt.float().double(), coefs), target_type)
    of_xt, of_y = (
        getattr(convert(zero, time, xt, coefs), target_type),
        getattr(convert(y, time, zero, coefs), target_type),
    )
    if model_type == target_type:
        of_xt = zero  # returned unchanged
    rounded = Coefs(**{name: torch.as_tensor(value).float() for name, value in vars(coefs).items()})
    single = getattr(convert(y.float(), time.float(), xt.float(), rounded), target_type)
    terms = (of_xt.abs() + of_y.abs()).square().mean().sqrt()
    assert (single - exact).square().mean().sqrt() < 8 * 2**-24 * terms


@each_process
@each_type
@pytest.mark.parametrize('target_type', ROWS)
def test_error_factor_is_the_derivative_of_the_conversion(process_name, model_type, target_type):
    t, xt, x0, x1, coefs = case(process_name, [0.001, 0.2, 0.5, 0.8, 0.999])
    out = getattr(get_target_fn()(t, xt, x0, x1, coefs), model_type).requires_grad_()
    target = getattr(get_model_convert_fn(model_type)(out, t, xt, coefs), target_type)
    (derivative,) = torch.autograd.grad(target.sum(), out)
    factor = error_factor(model_type, target_type, coefs)
    assert factor.shape == t.shape
    torch.testing.assert_close(image(factor).expand_as(out), derivative, rtol=1e-9, atol=0)


def test_error_factor_of_the_own_type_is_1_where_it_is_singular_too():
    coefs = get_process(Config())(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert all(error_factor(name, name, coefs).tolist() == [1, 1] for name in ROWS)


def test_first_part_of_a_tuple_is_the_prediction():
    t, xt, x0, x1, coefs = case('rf', [0.3, 0.6])
    convert = get_model_convert_fn('velocity')
    for out in ((x1 - x0, torch.zeros(2)), (x1 - x0,)):
        assert torch.equal(convert(out, t, xt, coefs).x0, convert(x1 - x0, t, xt, coefs).x0)


def test_an_output_of_another_shape_is_refused():
    """Two channels would be broadcast against one, and nobody would notice."""
    _, xt, _, _, coefs = case('rf', [0.3, 0.6])
    out = torch.zeros(2, 2 * xt.shape[1], *xt.shape[2:])
    with pytest.raises(
        ValueError, match=r"returns \(2, .* for xt of shape .*model_type='velocity' must have the shape of xt"
    ):
        get_model_convert_fn('velocity')(out, coefs.alpha, xt, coefs)


def test_F_has_unit_variance_and_no_singular_end():
    """For data of variance sigma_data^2, at every time of every process (Karras et al. 2022, appendix B.6)."""
    generator = torch.Generator().manual_seed(0)
    for process_name in PROCESSES:
        process = get_process(Config(process_name=process_name, sigma_data=0.3))
        t = torch.tensor([0.0, 0.01, 0.4, 0.99, 1.0], dtype=torch.float64)
        x0, x1 = torch.randn(2, 5, 20000, generator=generator, dtype=torch.float64)[..., None, None]
        c = process(t)
        F = get_target_fn()(t, process.compute_xt(0.3 * x0, x1, c), 0.3 * x0, x1, c).F
        torch.testing.assert_close(F.var((1, 2, 3)), torch.ones(5, dtype=torch.float64), rtol=0.04, atol=0)
        back = get_model_convert_fn('F')(F, t, process.compute_xt(0.3 * x0, x1, c), c)
        torch.testing.assert_close(back.x0, 0.3 * x0)
        torch.testing.assert_close(back.x1, x1)


@each_type
def test_own_type_is_returned_as_it_came_and_nothing_is_computed(model_type):
    out = torch.randn(2, 1, 4, 4)
    converted = get_model_convert_fn(model_type)(out, None, torch.randn(2, 1, 4, 4), coefs=None)
    assert getattr(converted, model_type) is out


def test_only_the_types_that_are_read_are_computed():
    t, xt, x0, x1, coefs = case('rf', [0.3])
    converted = get_model_convert_fn('velocity')(x1 - x0, t, xt, coefs)
    first = converted.x0
    assert set(vars(converted)) & set(ROWS) == {'velocity', 'x0'}
    assert converted.x0 is first
    targets = get_target_fn()(t, xt, x0, x1, None)
    assert targets.x0 is x0 and targets.x1 is x1


@pytest.mark.parametrize('model_type', ['x1', 'score'])
def test_noise_is_exact_where_alpha_is_0(model_type):
    t, xt, x0, x1, coefs = case('rf', [1.0])
    assert coefs.alpha.item() == 0
    converted = get_model_convert_fn(model_type)(BY_HAND[model_type](x0, x1, coefs), t, xt, coefs)
    assert torch.equal(converted.x1, x1)
    assert torch.equal(converted.score, -x1)


def test_data_is_exact_where_sigma_is_0():
    t, xt, x0, x1, coefs = case('rf', [0.0])
    assert torch.equal(get_model_convert_fn('x0')(x0, t, xt, coefs).x0, x0)
    assert torch.equal(get_model_convert_fn('velocity')(x1 - x0, t, xt, coefs).x0, x0)


def test_small_negative_denominators_are_not_shifted():
    """At det = -1e-6, an epsilon of 1e-8 that hides a singularity would be visible."""
    one = torch.ones(1, dtype=torch.float64)
    coefs = Coefs(alpha=one, sigma=one, alpha_dot=one, sigma_dot=one * (1 - 1e-6))
    x0, x1 = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    converted = get_model_convert_fn('velocity')(x0 + coefs.sigma_dot * x1, one, x0 + x1, coefs)
    torch.testing.assert_close(converted.x0, x0, rtol=1e-4, atol=1e-4)


def test_unknown_type_lists_the_choices():
    with pytest.raises(SettingError, match=r'noise.*x0, x1, score, velocity'):
        get_model_convert_fn('noise')
    with pytest.raises(AttributeError, match=r'noise.*velocity'):
        _ = Prediction(torch.zeros(1, 1, 1, 1), None).noise


def check(process_name, model_type, target_type, t_min, t_max):
    config = Config(process_name=process_name, model_type=model_type, target_type=target_type, t_min=t_min, t_max=t_max)
    check_time_range(config, get_process(config))


ENDS = {'t_min': 0.0, 't_max': 1.0}
REJECTED = [
    ('rf', 'x1', 'velocity', 't_max'),
    ('rf', 'x1', 'x1', 't_max'),
    ('rf', 'score', 'velocity', 't_max'),
    ('cosine', 'x1', 'velocity', 't_max'),
    ('cosine', 'score', 'x0', 't_max'),
    ('rf', 'x0', 'velocity', 't_min'),
    ('rf', 'x0', 'x0', 't_min'),
    ('cosine', 'x0', 'x0', 't_min'),
    ('rf', 'score', 'score', 't_min'),
    ('rf', 'score', 'velocity', 't_min'),
    ('cosine', 'score', 'x1', 't_min'),
    ('rf', 'velocity', 'score', 't_min'),
    *[('linear_vp', model_type, 'velocity', 't_min') for model_type in ROWS],
    *[('linear_vp', model_type, model_type, 't_min') for model_type in ROWS],
]


@pytest.mark.parametrize(('process_name', 'model_type', 'target_type', 'setting'), REJECTED)
def test_singular_end_is_rejected_with_a_remedy_that_works(process_name, model_type, target_type, setting):
    with pytest.raises(SettingError) as error:
        check(process_name, model_type, target_type, **(dict(t_min=0.001, t_max=0.999) | {setting: ENDS[setting]}))
    text = str(error.value)
    assert f'{setting}={ENDS[setting]:g}' in text and repr(model_type) in text and repr(process_name) in text
    remedy = text.split(f'--{setting} ')[1].rstrip('.')
    check(process_name, model_type, target_type, **(dict(t_min=0.001, t_max=0.999) | {setting: float(remedy)}))


ACCEPTED = [
    ('rf', 'velocity', 'velocity'),
    ('rf', 'v', 'velocity'),
    ('cosine', 'velocity', 'v'),
    ('cosine', 'v', 'x0'),
    *[('ve', *types) for types in itertools.product(ROWS, ROWS)],
]


@pytest.mark.parametrize(('process_name', 'model_type', 'target_type'), ACCEPTED)
def test_whole_range_is_accepted(process_name, model_type, target_type):
    check(process_name, model_type, target_type, 0.0, 1.0)


def test_noise_that_the_sde_cannot_have_is_rejected():
    """Here sigma_dot is 0 where sigma is 0, so the velocity is finite but says nothing about x1."""

    class Slow(GaussianProcess):
        def alpha(self, t):
            return 1 - t

        def sigma(self, t):
            return t**2

    with pytest.raises(SettingError, match='t_min=0'):
        check_time_range(Config(t_min=0.0), Slow())
    check_time_range(Config(), Slow())


@each_process
@each_type
@pytest.mark.parametrize('target_type', ROWS)
def test_accepted_times_allow_all_conversions(process_name, model_type, target_type):
    """An exact output at either end gives the exact target, velocity and noise, in float64.

    0.001 to 0.999 is always accepted.
    """
    for t_min, t_max in itertools.product([0.0, 1e-9, 0.001], [1.0, 1 - 1e-9, 0.999]):
        try:
            check(process_name, model_type, target_type, t_min, t_max)
        except SettingError:
            assert (t_min, t_max) != (0.001, 0.999)
            continue
        t, xt, x0, x1, coefs = case(process_name, [t_min, t_max])
        truth = get_target_fn()(t, xt, x0, x1, coefs)
        converted = get_model_convert_fn(model_type)(getattr(truth, model_type), t, xt, coefs)
        for needed in (target_type, 'velocity', 'x1'):
            torch.testing.assert_close(getattr(converted, needed), getattr(truth, needed), rtol=1e-6, atol=1e-6)


def test_a_process_in_the_wrong_direction_gets_a_message():
    class DataAtOne(GaussianProcess):
        def alpha(self, t):
            return t

        def sigma(self, t):
            return 1 - t

    with pytest.raises(SettingError, match='does not lead from data at t = 0 to noise at t = 1'):
        check_time_range(Config(), DataAtOne())
