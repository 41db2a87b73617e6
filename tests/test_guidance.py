"""Guidance and conditions, against scores and Gaussians whose exact guided flow is known."""

import pytest
import torch

from config import Config, SettingError
from prediction import ROWS
from processes import PROCESSES
from sampling import Guidance, get_sample_fn, sample
from solvers import SOLVERS, Solver, on_path
from tests.oracle import F64, RING, GaussianMixture, GivenMean, at, base_noise, process_named, random_mixture, ring
from utils import bcast_right

each_process = pytest.mark.parametrize('process_name', PROCESSES)
LABEL, NULL = torch.arange(20) % 2, 2
WIDE = ring(8, 0.3)


def score_of(mixture, label=None):
    return lambda x, c: mixture.prediction(x, c, label).score


def euler_step_by_score(process, x, t, s, score):
    """An Euler step of dx/dt = f x - g^2 / 2 score (Song et al. 2021, eq. 13)."""
    c = at(process, t, len(x))
    return x + (s - t) * (bcast_right(c.f, 2) * x - bcast_right(c.g, 2) ** 2 / 2 * score(x, c))


@each_process
@pytest.mark.parametrize('model_type', ROWS)
@pytest.mark.parametrize('guide', ['null', 'model'])
def test_guided_score_by_hand(process_name, model_type, guide):
    """score = guide's + scale (class's - guide's), for every type of output."""
    process, scale = process_named(process_name), 3.0
    plain, other = score_of(RING, LABEL), score_of(RING) if guide == 'null' else score_of(WIDE, LABEL)
    who = dict(null_label=NULL) if guide == 'null' else dict(guide_fn=WIDE.as_model(model_type, process))
    x1, (t_max, t_min) = base_noise(20), (0.7, 0.6)
    x = sample(
        RING.as_model(model_type, process),
        process,
        x1,
        LABEL,
        model_type=model_type,
        solver='euler',
        num_steps=1,
        guidance_scale=scale,
        t_max=t_max,
        t_min=t_min,
        **who,
    )

    def score(x, c):
        return other(x, c) + scale * (plain(x, c) - other(x, c))

    expected = euler_step_by_score(process, at(process, t_max).sigma * x1, t_max, t_min, score)
    torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-8)


def test_guidance_of_a_tilted_gaussian_is_exact():
    """Two classes N(+-m, s^2): p(x|c)^2 / p(x|other class) is again a Gaussian, and the guided ODE is its flow.

    With guide N(-m, s^2) and scale 2, the score equals the score of N(3m, s^2 + ...) at every t.
    """
    process, m, s = process_named('cosine'), 0.4, 0.3
    plain, guide, tilted = (
        GaussianMixture(torch.tensor([[mean]], dtype=F64), torch.tensor([[[s**2]]], dtype=F64))
        for mean in (m, -m, 3 * m)
    )
    settings = dict(process=process, x1=base_noise(100, 1), model_type='v', num_steps=60)
    x = sample(plain.as_model('v', process), **settings, guidance_scale=2.0, guide_fn=guide.as_model('v', process))
    torch.testing.assert_close(x, sample(tilted.as_model('v', process), **settings), rtol=1e-9, atol=1e-9)


def count_rows(**settings):
    """(number of images, time) of each call of the network."""
    calls = []

    def model_fn(xt, t, label):
        calls.append((t[0].item(), label.tolist()))
        assert len(xt) == len(t) == len(label)
        return torch.zeros_like(xt)

    sample(
        model_fn,
        process_named('rf'),
        torch.zeros(2, 1, 1, 1),
        torch.tensor([0, 1]),
        solver='euler',
        num_steps=9,
        time_grid='uniform',
        **settings,
    )
    return calls


def test_guidance_is_one_batched_call():
    assert [labels for _, labels in count_rows(guidance_scale=2.0, null_label=NULL)] == [[0, 1, 2, 2]] * 9
    assert [labels for _, labels in count_rows(null_label=NULL)] == [[0, 1]] * 9


def test_guidance_in_an_interval():
    calls = count_rows(guidance_scale=2.0, null_label=NULL, guidance_interval=(0.3, 0.6))
    assert [len(labels) == 4 for _, labels in calls] == [0.3 <= t <= 0.6 for t, _ in calls]
    assert 0 < sum(len(labels) == 4 for _, labels in calls) < 9


@pytest.mark.parametrize('rescale', [0.0, 0.5, 1.0])
def test_guidance_rescale(rescale):
    """phi = 1 gives each x0 the standard deviation that it has without guidance (Lin et al. 2023, eq. 15)."""
    process = process_named('rf')
    mixture = random_mixture(12, 4, classes=2)
    x, t = base_noise(6, 12), 0.6

    def x0(**settings):
        guidance = Guidance(null_label=2, **settings)
        predictor = guidance.predictor(mixture.as_model('velocity', process), torch.arange(6) % 2, {}, 'velocity')
        return predictor(x, t, None, at(process, t)).x0

    plain, strong, scaled = x0(), x0(scale=5.0), x0(scale=5.0, rescale=rescale)
    ratio = plain.std(1, keepdim=True) / strong.std(1, keepdim=True)
    torch.testing.assert_close(scaled, strong * (rescale * ratio + 1 - rescale))
    assert (ratio < 0.99).any()


def test_guidance_rescale_does_not_touch_a_predicted_x0_without_contrast():
    """Its standard deviation is 0, by which nothing can be divided."""
    flat = torch.tensor([[0.25, 0.25], [0.5, -0.5]], dtype=F64)  # one x0 without contrast, and one with contrast

    def model_fn(xt, t, label):
        return torch.cat([flat, flat / 2])

    predictor = Guidance(3.0, null_label=2, rescale=1.0).predictor(model_fn, torch.tensor([0, 1]), {}, 'x0')
    x0 = predictor(base_noise(2), 0.6, None, at(process_named('rf'), 0.6)).x0
    guided = flat / 2 + 3 * (flat - flat / 2)
    torch.testing.assert_close(x0, torch.stack([guided[0], flat[1]]))


# ---------------------------------------------------------------- conditions

GIVEN, NAN = GivenMean(), float('nan')
MEAN = GIVEN.spread * base_noise(60)[40:]


@each_process
def test_the_oracle_of_given_means_is_a_mixture_of_one(process_name):
    process, xt = process_named(process_name), base_noise(1)
    for mean, std in ((MEAN[:1], 0.3), (torch.full((1, 2), NAN), (0.3**2 + 0.8**2) ** 0.5)):
        mixture = GaussianMixture(mean.nan_to_num(), std**2 * torch.eye(2, dtype=F64)[None])
        expected = mixture.prediction(xt, at(process, 0.6))
        for model_type in ROWS:
            out = getattr(GIVEN.prediction(xt, at(process, 0.6), mean), model_type)
            torch.testing.assert_close(out, getattr(expected, model_type), rtol=1e-9, atol=1e-9)


@each_process
@pytest.mark.parametrize('null', [NAN, torch.full((2,), NAN)], ids=['number', 'tensor'])
def test_score_guided_by_a_condition_by_hand(process_name, null):
    process, x1, scale = process_named(process_name), base_noise(20), 3.0
    settings = dict(model_type='v', solver='euler', num_steps=1, t_max=0.7, t_min=0.6)
    guidance = dict(cond={'mean': MEAN}, null_cond={'mean': null}, guidance_scale=scale)
    x = sample(GIVEN.as_model('v', process), process, x1, **settings, **guidance)

    def score(x, c):
        plain, other = (GIVEN.prediction(x, c, mean).score for mean in (MEAN, torch.full_like(MEAN, NAN)))
        return other + scale * (plain - other)

    expected = euler_step_by_score(process, at(process, 0.7).sigma * x1, 0.7, 0.6, score)
    torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-8)


def calls_of(label=None, fn=None, **settings):
    """Arguments of each call of the network in an Euler step of two items."""
    calls = []

    def model_fn(xt, t, label=None, **cond):
        calls.append(dict(cond, label=label))
        return torch.zeros_like(xt)

    settings = dict(solver='euler', num_steps=1) | settings
    (fn or sample)(model_fn, x1=torch.zeros(2, 3), label=label, **settings)
    return [{name: None if v is None else v.tolist() for name, v in call.items()} for call in calls]


RF = dict(process=process_named('rf'))
INK, SIZE, TEXT = torch.tensor([0.5, 0.7]), torch.tensor([3, 4]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def test_every_call_gets_the_conditions_as_they_are():
    for solver in ('heun', 'adams', 'sde_dpmpp_2m'):
        calls = calls_of(**RF, cond={'ink': INK, 'text': TEXT}, solver=solver, num_steps=2)
        assert calls == [dict(label=None, ink=INK.tolist(), text=TEXT.tolist())] * len(calls) and len(calls) >= 2


def test_class_and_conditions_are_left_out_together_except_those_without_a_null_value():
    cond = {'ink': INK, 'text': TEXT, 'size': SIZE}
    settings = dict(**RF, cond=cond, guidance_scale=2.0, null_label=9)
    (call,) = calls_of(torch.tensor([4, 5]), **settings, null_cond={'ink': -1, 'text': torch.tensor([7.0, 8.0])})
    ink, text = INK.tolist(), TEXT.tolist()
    assert call == dict(label=[4, 5, 9, 9], ink=[*ink, -1, -1], text=[*text, [7, 8], [7, 8]], size=[3, 4, 3, 4])
    (call,) = calls_of(None, **settings, null_cond={'size': 0.5})  # no label; the null value 0.5 stays 0.5
    assert call == dict(label=None, ink=ink * 2, text=text * 2, size=[3, 4, 0.5, 0.5])


def test_a_float_label_is_the_same_in_both_branches():
    label = torch.tensor([0.25, 0.5])
    settings = dict(**RF, guidance_scale=2.0, null_label=9)
    (call,) = calls_of(label, **settings, cond={'ink': INK}, null_cond={'ink': 0})
    assert call['label'] == [0.25, 0.5, 0.25, 0.5]
    with pytest.raises(SettingError, match=r'guidance_scale=2.*whole-number'):
        calls_of(label, **settings)


def test_the_guide_gets_the_conditions_too():
    seen = []
    guide = lambda xt, t, label, **cond: seen.append(cond) or 0 * xt  # noqa: E731
    calls_of(**RF, cond={'ink': INK}, null_cond={'ink': 0}, guidance_scale=2.0, guide_fn=guide)
    assert len(seen) == 1 and seen[0]['ink'] is INK


@pytest.mark.parametrize('guide', ['null', 'model'])
@pytest.mark.parametrize('scale', [1.0, 3.0])
def test_the_first_part_of_a_tuple_is_the_prediction(guide, scale):
    process = process_named('rf')

    def as_tuple(fn):
        return lambda *inputs: (fn(*inputs), torch.zeros(7))

    def samples(change):
        who = dict(null_label=NULL) if guide == 'null' else dict(guide_fn=change(WIDE.as_model('v', process)))
        who = {} if scale == 1 else who
        model_fn = change(RING.as_model('v', process))
        return sample(model_fn, process, base_noise(20), LABEL, model_type='v', guidance_scale=scale, **who)

    assert torch.equal(samples(as_tuple), samples(lambda fn: fn))


@pytest.mark.parametrize(
    'given', [dict(label=torch.tensor([0, 1])), dict(null_label=NULL), dict(cond={'ink': INK}), {}]
)
def test_guidance_with_nothing_to_leave_out_is_refused(given):
    with pytest.raises(SettingError, match=r'guidance_scale=2.*null_label.*label_dropout.*null_cond.*guide_fn'):
        calls_of(**RF, guidance_scale=2.0, **given)


@pytest.mark.parametrize(
    ('settings', 'match'),
    [
        (dict(guidance_interval=(0.8, 0.2)), r'guidance_interval=\(0.8, 0.2\).*from <= to'),
        (dict(guidance_rescale=3.0), r'guidance_rescale=3.*between 0 and 1'),
        (dict(guide_fn=lambda xt, t, label: xt), 'guidance_scale=1: guide_fn has no effect'),
        (dict(guidance_scale=2.0, null_cond={'ink': 0}), "null_cond has a value for 'ink'.*none"),
        (dict(guidance_scale=2.0, null_cond={'ink': 0}, cond={'size': SIZE}), r"'ink'.*size\. Pass it"),
        (dict(null_cond={'ink': torch.zeros(3)}, cond={'ink': INK}), r"null_cond\['ink'\] has shape \(3,\).*\(2,\)"),
        (dict(cond={'ink': 0.5}), r"cond\['ink'\] is 0.5.*\(2, \.\.\.\)"),
        (dict(cond={'text': TEXT[:1]}), r"cond\['text'\] is shape \(1, 2\).*2 items"),
    ],
)
def test_values_that_make_no_sense_are_refused(settings, match):
    with pytest.raises(SettingError, match=match):
        calls_of(**RF, **settings)


# ---------------------------------------------------------------- a network that was not trained for guidance


@pytest.mark.parametrize('label_dropout', [0.0, 1.0])
def test_guidance_needs_label_dropout_in_training(label_dropout):
    """`get_sample_fn` has the config, so a notebook raises the same error as the command line."""
    fn = get_sample_fn(Config(label_dropout=label_dropout), process_named('rf'), null_label=9, null_cond=None)
    label = torch.tensor([4, 5])
    with pytest.raises(SettingError, match=f'guidance_scale=2.*label_dropout={label_dropout:g}.*label_dropout 0.1'):
        calls_of(label, fn, guidance_scale=2.0)
    assert calls_of(label, fn) == [dict(label=[4, 5])]
    guide = dict(guidance_scale=2.0, guide_fn=lambda xt, t, label, **cond: 0 * xt)
    assert calls_of(label, fn, **guide) == [dict(label=[4, 5])]
    (call,) = calls_of(label, fn, guidance_scale=2.0, cond={'ink': INK}, null_cond={'ink': 0})
    assert call['label'] == [4, 5, 4, 5]  # which has not learned the null class


def test_guidance_needs_classes():
    fn = get_sample_fn(Config(label_dropout=0.1), process_named('rf'), null_label=0)
    with pytest.raises(SettingError, match=r'guidance_scale=2: with 0 classes.*guidance_scale=1'):
        calls_of(torch.tensor([0, 0]), fn, guidance_scale=2.0)


def test_null_values_of_the_experiment_reach_the_sampler():
    fn = get_sample_fn(Config(label_dropout=0.1), process_named('rf'), null_label=9, null_cond={'ink': -1})
    (call,) = calls_of(torch.tensor([4, 5]), fn, guidance_scale=2.0, cond={'ink': INK})
    assert call == dict(label=[4, 5, 9, 9], ink=[*INK.tolist(), -1, -1])


# ---------------------------------------------------------------- networks of two times

AVERAGE_VELOCITY = Solver(lambda x, t, s, predict, noise: x + (s - t) * predict(x, t, s).velocity, nfe=1, order=1)


@each_process
@pytest.mark.parametrize('num_steps', [1, 3])
def test_average_velocity_is_one_row_of_the_table(process_name, num_steps, monkeypatch):
    """It is exact in any number of steps if the network is exact (Geng et al. 2025, algorithm 2)."""
    monkeypatch.setitem(SOLVERS, 'average', AVERAGE_VELOCITY)
    process = process_named(process_name)
    settings = dict(solver='average', num_steps=num_steps, time_grid='uniform', t_min=0.02, t_max=0.98)
    x = sample(GIVEN.as_flow_map(process), process, base_noise(20), cond={'mean': MEAN}, **settings)
    start, end = at(process, 0.98), at(process, 0.02)
    torch.testing.assert_close(x, GIVEN.flow(start.sigma * base_noise(20), start, end, MEAN), rtol=1e-9, atol=1e-9)
    # the flow of the oracle ends where the ODE ends
    settings = dict(cond={'mean': MEAN}, t_min=0.02, t_max=0.98, num_steps=300, solver='rk4')
    fine = sample(GIVEN.as_model('velocity', process), process, base_noise(20), **settings)
    torch.testing.assert_close(x, fine, rtol=1e-4, atol=1e-4)


def test_the_time_of_arrival_is_a_condition_of_the_type_of_t():
    rf, ve, seen = process_named('rf'), process_named('ve'), []

    def model_fn(xt, t, label=None, **cond):
        seen.append((t, cond))
        return torch.zeros_like(xt)

    x = torch.zeros(3, 2, dtype=torch.bfloat16)
    predictor = Guidance().predictor(model_fn, None, {'ink': torch.zeros(3)}, 'velocity')
    on_path(predictor, rf, rf)(x, 0.75, 0.125)
    on_path(predictor, rf, rf)(x, 0.75)
    (t, cond), (_, without) = seen
    assert (
        t.tolist() == [0.75] * 3 and cond['s'].tolist() == [0.125] * 3 and cond['s'].dtype == t.dtype == torch.float32
    )
    assert cond.keys() == {'ink', 's'} and without.keys() == {'ink'}

    on_path(predictor, rf, ve)(x.double(), 0.6, 0.5)  # times of ve
    ratio = at(ve, 0.5).sigma
    torch.testing.assert_close(seen[-1][1]['s'], (ratio / (1 + ratio)).expand(3))  # the time of equal log-SNR


@pytest.mark.parametrize(('null_cond', 'expected'), [({'ink': 0}, [0.125] * 4), ({'s': -1}, [0.125, 0.125, -1, -1])])
def test_guidance_of_a_network_of_two_times(null_cond, expected):
    seen = []
    model_fn = lambda xt, t, label=None, **cond: seen.append(cond) or 0 * xt  # noqa: E731
    predictor = Guidance(2.0, null_cond=null_cond).predictor(model_fn, None, {'ink': INK}, 'velocity')
    predictor(torch.zeros(2, 2), 0.75, 0.125, at(process_named('rf'), 0.75))
    assert seen[0]['s'].tolist() == expected


@pytest.mark.parametrize('solver', SOLVERS)
def test_solvers_of_the_table_pass_one_time_only(solver):
    assert all('s' not in call for call in calls_of(**RF, solver=solver))
