"""The test, on the first images, of whether x1 is the process's base, drawn independently of x0."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from config import SettingError
from processes import PROCESSES, GaussianProcess, RectifiedFlow
from tests.helpers import slow_but
from trainer import ExampleDiffusionTrainer, SampleInputs
from training import independence
from training.independence import base_is_normal, signs_of_dependence, unlike_base


def with_base(make):
    """A trainer class whose x1 is make(x0)."""

    class Based(ExampleDiffusionTrainer):
        def prepare_batch_fn(self, batch, is_train):
            prepared = super().prepare_batch_fn(batch, is_train)
            return dataclasses.replace(prepared, x1=make(prepared.x0))

    return Based


def corner(x0):
    """The lower right of an image, plus noise: it depends on x0, though the two correlate only by 0.2."""
    x1 = 0.1 * torch.randn_like(x0)
    x1[:, :, 5:, 5:] += x0[:, :, 5:, 5:]
    return x1


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (corner, 'x1 depends on x0'),
        (torch.abs, 'x1 depends on x0'),
        (lambda x0: 0.7 * x0 + 0.7 * torch.randn_like(x0), 'x1 depends on x0'),
        (lambda x0: 3 * torch.randn_like(x0), 'but 1.00 for the base of process'),
        (torch.rand_like, 'the mean of x1 is 0.'),
    ],
    ids=['corner', 'size', 'mixed', 'wide', 'uniform'],
)
@pytest.mark.parametrize('batch', [16, 64])
def test_a_base_that_is_not_independent_noise_is_seen(tiny_config, build_trainer, capsys, make, words, batch):
    trainer = build_trainer(tiny_config(global_batch_size=batch), with_base(make))
    assert not trainer.independent and words in capsys.readouterr().out
    assert list(trainer.samplers()) == ['adams']
    inputs = trainer.sample_inputs(30)
    assert inputs.x1.std().item() == pytest.approx(trainer.example.x1.std().item(), rel=0.2)  # as in training
    assert len(inputs.given) == 1 and inputs.given[0].equal(trainer.decode(inputs.x1)) and inputs.truth is not None


@pytest.mark.parametrize('seed', range(20))
def test_noise_is_never_taken_for_data(tiny_config, build_trainer, seed):
    blurred = with_base(lambda x0: nn.functional.avg_pool2d(torch.randn_like(x0), 3, 1, 1) * 3)  # correlated pixels
    assert build_trainer(tiny_config(seed=seed, experiment_name='noise')).independent
    trainer = build_trainer(tiny_config(seed=seed, experiment_name='blurred'), blurred)
    assert 'depends' not in (signs_of_dependence(trainer, trainer.batches) or '')


def test_independence_that_an_instance_sets_counts(tiny_config, build_trainer):
    class Stated(ExampleDiffusionTrainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.independent = False

    assert not build_trainer(tiny_config(), Stated).independent


class Claimed(with_base(corner)):
    independent = True


def test_independence_that_a_class_claims_wrongly_is_refused(tiny_config, build_trainer):
    with pytest.raises(
        SettingError, match=r'Claimed\.independent is True, but x1 depends on x0.*Set independent = False'
    ):
        build_trainer(tiny_config(), Claimed)


def test_a_wrong_claim_only_warns_if_the_experiment_gives_its_own_inputs(tiny_config, build_trainer, capsys):
    class Own(Claimed):
        def sample_inputs(self, n):
            return SampleInputs(torch.zeros(n, 1, 8, 8))

    trainer = build_trainer(tiny_config(), Own)
    assert not trainer.independent and list(trainer.samplers()) == ['adams']  # the score is not known
    assert 'Own.independent is True, but x1 depends on x0' in capsys.readouterr().out


# ---------------------------------------------------------------- the distribution of x1


def corners(x):  # mean 0, standard deviation 1
    return (0.98 * x.sign() + 0.199 * torch.randn_like(x)) * 1.0


def blurred(x):
    y = nn.functional.avg_pool2d(x, 3, 1, 1) if x.ndim == 4 else x + x.flip(1)
    return y / y.std()


OTHER_BASES = {
    'corners': corners,
    'uniform': lambda x: (2 * torch.rand_like(x) - 1) * 3**0.5,
    'laplace': lambda x: torch.distributions.Laplace(0.0, 0.5**0.5).sample(x.shape),
    'sphere': lambda x: x / x.flatten(1).norm(dim=1).view(-1, *(1,) * (x.ndim - 1)) * x[0].numel() ** 0.5,
    'blurred': blurred,
    'one template': lambda x: 0.8 * x + 0.6 * torch.linspace(-1.7, 1.7, x[0].numel()).view(1, *x.shape[1:]),
    'scales': lambda x: x * (0.4 + 1.1 * torch.rand(len(x), *(1,) * (x.ndim - 1))),
    'sparse': lambda x: x * (torch.rand_like(x) < 0.5) * 2**0.5,
}


@pytest.mark.parametrize('shape', [(1, 8, 8), (2,), (3, 64, 64)], ids=str)
@pytest.mark.parametrize('name', OTHER_BASES)
def test_another_distribution_of_mean_0_and_standard_deviation_1_is_seen(name, shape):
    if name == 'sphere' and len(shape) == 3 and shape[1] > 8:
        pytest.skip('in so many dimensions the lengths of normal noise are equal, too')
    torch.manual_seed(0)
    x1 = OTHER_BASES[name](torch.randn(max(128, 2**14 // math.prod(shape)), *shape))
    assert unlike_base(x1, GaussianProcess(), 'rf') is not None


@pytest.mark.parametrize('shape', [(1, 8, 8), (2,), (3, 64, 64), (1,), (16, 3)], ids=str)
@pytest.mark.parametrize('seed', slow_but(range(5), range(25)))
def test_noise_is_never_taken_for_another_distribution(seed, shape):
    torch.manual_seed(seed)
    x1 = torch.randn(max(64, 2**14 // math.prod(shape)), *shape)
    assert unlike_base(x1, GaussianProcess(), 'rf') is None


@pytest.mark.slow
def test_points_of_noise_are_never_taken_for_another_distribution():
    """Mean squares of two numbers have long tails: without square roots, one run in forty was."""
    for seed in range(200):
        torch.manual_seed(seed)
        assert unlike_base(torch.randn(1024, 2), GaussianProcess(), 'rf') is None, seed


@pytest.mark.parametrize('shape', [(1, 8, 8), (3, 32, 32), (3, 64, 64)], ids=str)
def test_noise_with_a_small_offset_for_each_channel_is_seen(shape):
    """Offset noise of 0.1, which many networks are trained on."""
    n = max(64, min(1024, 2**16 // math.prod(shape)))
    for seed in range(10):
        torch.manual_seed(seed)
        x1 = torch.randn(n, *shape) + 0.1 * torch.randn(n, shape[0], 1, 1)
        assert 'the spread of the means' in (unlike_base(x1, GaussianProcess(), 'rf') or ''), seed


class Shared(GaussianProcess):
    """Another base: whole images are darker or lighter."""

    def sample_base(self, x0_like):
        return 0.8 * torch.randn_like(x0_like) + 0.6 * torch.randn(len(x0_like), *(1,) * (x0_like.ndim - 1))


@pytest.mark.parametrize('seed', range(10))
def test_a_base_of_the_process_is_compared_with_itself(seed):
    torch.manual_seed(seed)
    x1 = Shared().sample_base(torch.zeros(256, 1, 8, 8))
    assert unlike_base(x1, Shared(), 'own') is None and unlike_base(x1, GaussianProcess(), 'rf') is not None


def test_the_four_corners_start_from_their_own_base(tiny_config, build_trainer, capsys):
    """Independent of x0, with mean 0 and standard deviation 1. Training and sampling must use the same base."""
    points = tiny_config(dataset='moons', network='mlp', attention_resolutions=(), experiment_name='corners')
    trainer = build_trainer(points, with_base(lambda x0: corners(torch.randn_like(x0))))
    assert not trainer.independent and 'samples start from x1 of held-out data' in capsys.readouterr().out
    assert trainer.sample_inputs(200).x1.abs().mean() > 0.93  # 0.8 of noise
    assert list(trainer.samplers()) == ['adams'] and not trainer.judge.has_reference


def test_a_decision_for_noise_is_printed_if_the_experiment_prepares_batches(tiny_config, build_trainer, capsys):
    assert build_trainer(tiny_config(), with_base(torch.randn_like)).independent
    assert "Based.independent is True: x1 of the first images looks like the process's base" in capsys.readouterr().out
    assert build_trainer(tiny_config(experiment_name='default')).independent
    assert 'independent' not in capsys.readouterr().out


def test_a_base_that_is_not_normal_has_no_score(tiny_config, build_trainer, monkeypatch, capsys):
    monkeypatch.setattr(GaussianProcess, 'alpha', lambda self, t: 1 - t)
    monkeypatch.setattr(GaussianProcess, 'sigma', lambda self, t: t)
    monkeypatch.setitem(PROCESSES, 'shared', lambda config: Shared())
    trainer = build_trainer(tiny_config(process_name='shared'))
    assert trainer.independent and not trainer.judge.has_reference and list(trainer.samplers()) == ['adams']
    assert 'eval/reference is left out' in capsys.readouterr().out
    state = torch.get_rng_state()
    assert not independence.base_is_normal(Shared(), trainer.example.x0) and torch.get_rng_state().equal(state)
    with pytest.raises(SettingError, match=r'sample_base of Shared is not N\(0, I\).*--solver adams'):
        trainer.draw(trainer.get_model_fn(trainer.network), trainer.sample_inputs(2), 'sde_dpmpp_2m')


def test_another_way_to_draw_normal_noise_keeps_the_score(tiny_config, build_trainer, monkeypatch):
    class Mirrored(RectifiedFlow):
        def sample_base(self, x0_like):
            x = torch.randn_like(x0_like)
            return torch.cat([x[: (len(x) + 1) // 2], -x[: len(x) // 2]])

    monkeypatch.setitem(PROCESSES, 'mirrored', lambda config: Mirrored())
    trainer = build_trainer(tiny_config(process_name='mirrored'))
    assert trainer.independent and trainer.judge.has_reference


class Template(GaussianProcess):
    """Another base: noise around one image."""

    def sample_base(self, x0_like):
        return torch.randn_like(x0_like) + torch.linspace(-2, 2, x0_like[0].numel()).view(x0_like[0].shape)


def test_an_image_that_all_draws_of_a_base_share_is_not_taken_for_data(tiny_config, build_trainer, monkeypatch):
    monkeypatch.setattr(Template, 'alpha', RectifiedFlow.alpha)
    monkeypatch.setattr(Template, 'sigma', RectifiedFlow.sigma)
    monkeypatch.setitem(PROCESSES, 'template', lambda config: Template())
    assert build_trainer(tiny_config(process_name='template')).independent


def test_whether_a_base_is_normal_does_not_depend_on_the_random_state():
    """So that all processes decide the same."""
    drawn = []

    class Kept(RectifiedFlow):
        def sample_base(self, x0_like):
            drawn[-1].append(torch.randn_like(x0_like))
            return drawn[-1][-1]

    for seed in range(2):
        torch.manual_seed(seed)
        drawn.append([])
        assert base_is_normal(Kept(), torch.zeros(4, 1, 8, 8))
    assert torch.stack(drawn[0]).equal(torch.stack(drawn[1]))
