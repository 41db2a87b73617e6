"""examples/exercises.md: its commands, its Python blocks, and what it claims of the solutions."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from unittest import mock

import pytest
import torch

import augmentations
import main
from config import Config, parse_config
from data_utils import DATASETS
from evaluation import judge
from prediction import Prediction
from processes import get_process
from reports import pictures
from runtime.importing import import_file
from sampling import sample
from solvers import SOLVERS
from tests.helpers import ROOT, TINY, as_flags, launch_env, record_of
from trainer import ExampleDiffusionTrainer

FOLDER = ROOT / 'examples/solutions'
PAGE = (ROOT / 'examples/exercises.md').read_text()
PARTS = re.split(r'^## (?=\d)', PAGE, flags=re.MULTILINE)[1:]  # one for each exercise
POINTS = dict(dataset='moons', network='mlp')
FOR_THE_UNET = ('channels', 'num_res_blocks', 'attention_resolutions')  # refused with the MLP


def solution_of(part: str) -> str | None:
    """The name of the file with the solution, which the exercise links to; None if flags are enough."""
    found = re.findall(r'\(solutions/(\w+)\.py\)', part)
    return found[0] if found else None


def commands_of(part: str) -> list[list[str]]:
    """The flags of each `sh run.sh ...` of an exercise."""
    text = ''.join(re.findall(r'^```console\n(.*?)^```$', part, re.DOTALL | re.MULTILINE)).replace('\\\n', ' ')
    return [shlex.split(line, comments=True)[2:] for line in text.splitlines()]


SOLUTIONS = {name: part for part in PARTS if (name := solution_of(part))}
COMMANDS = [(solution_of(part), words) for part in PARTS for words in commands_of(part)]


@pytest.fixture
def load(monkeypatch):
    """`load(name)`: the module of a solution, also as `mine`; all tables are restored afterwards."""
    monkeypatch.setattr(sys, 'path', list(sys.path))

    def load(name):
        monkeypatch.setitem(sys.modules, 'mine', import_file(f'examples/solutions/{name}.py'))
        return sys.modules['mine']

    with contextlib.ExitStack() as stack:
        for table in [*main.choices().values(), augmentations.AUGMENTATIONS, augmentations.LABELS]:
            stack.enter_context(mock.patch.dict(table))
        yield load
    for name in SOLUTIONS:  # imported again, it fills the tables again
        sys.modules.pop(name, None)


@pytest.fixture
def build(load, build_trainer, tmp_path, monkeypatch):
    """`build(name, class_name=None, **settings) -> trainer` of a solution, tiny; name '': the plain trainer."""

    monkeypatch.setattr(pictures, 'POINTS_SHOWN', 50)
    monkeypatch.setattr(judge, 'NUM_JUDGED', 64)

    def build(name, class_name=None, **settings):
        module = load(name) if name else None
        chosen = TINY | dict(ckpt_dir=str(tmp_path), experiment_name=name or 'plain', ema_decays=(0.9,)) | settings
        trainer_class = getattr(module, class_name) if class_name else ExampleDiffusionTrainer
        return build_trainer(getattr(module, 'Settings', Config)(**chosen), trainer_class)

    return build


# ---------------------------------------------------------------- the page


def test_each_exercise_has_its_parts_and_each_solution_its_exercise():
    assert [int(part.split('.')[0]) for part in PARTS] == list(range(1, 9))
    for part in PARTS:
        heads = re.findall(r'^\*\*(\w+(?: \w+)*)\.\*\*', part, re.MULTILINE)
        assert heads == ['Task', 'You should see', 'Hint', 'What you learned'], heads
        assert commands_of(part)
    assert set(SOLUTIONS) == {path.stem for path in FOLDER.glob('*.py')}


@pytest.mark.parametrize('name', SOLUTIONS)
def test_a_solution_is_short_and_names_its_exercise_and_its_command(name):
    text = (FOLDER / f'{name}.py').read_text()
    (number,) = [i for i, part in enumerate(PARTS, 1) if solution_of(part) == name]
    assert len(text.splitlines()) <= 60 and text.startswith(f'"""Exercise {number}: ')
    command = next(words for owner, words in COMMANDS if owner == name and words[0] == 'mine.py')
    assert {f'examples/solutions/{name}.py', *command[1:]} <= set(text.split('"""')[1].split())


def test_pictures_are_small():
    pictures = {ROOT / 'examples' / path for path in re.findall(r'!\[[^]]*\]\(([^)]+)\)', PAGE)}
    assert pictures == set((ROOT / 'examples').rglob('*.png'))
    assert sum(path.stat().st_size for path in pictures) < 300_000


@pytest.mark.parametrize(('name', 'words'), COMMANDS, ids=lambda x: ' '.join(x) if isinstance(x, list) else x)
def test_flags_of_a_command(load, name, words):
    if words[0] != 'compare.py':
        is_own = words[0] == 'mine.py'
        parse_config(words[is_own:], getattr(load(name), 'Settings', Config) if is_own else Config)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize('name', SOLUTIONS)
def test_a_command_with_the_solution(tmp_path, name):
    words = next(words for owner, words in COMMANDS if owner == name and words[0] == 'mine.py')
    short = {setting: value for setting, value in TINY.items() if setting not in FOR_THE_UNET}
    short |= dict(ckpt_dir=str(tmp_path), experiment_name='run')
    command = ['sh', 'run.sh', f'examples/solutions/{name}.py', *words[1:], *as_flags(short)]
    done = subprocess.run(command, cwd=ROOT, env=launch_env(1), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and 'step 12/12' in done.stdout, done.stderr


def printed_by(part: str) -> list[float]:
    """The numbers that the Python block of an exercise prints."""
    (code,) = re.findall(r'^```python\n(.*?)^```$', part, re.DOTALL | re.MULTILINE)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, 'exercises.md', 'exec'), {'__name__': 'notebook'})
    return [float(word) for word in re.findall(r'-?\d+(?:\.\d+)?(?:e-?\d+)?', out.getvalue())]


# ---------------------------------------------------------------- what the exercises claim


def test_1_the_block_prints_the_shares_of_times_in_the_middle_half():
    """logit(t) is N(0, 1), so 2 Phi(log 3) - 1 = 0.728 of all times lie between 1/4 and 3/4; of uniform times 0.501."""
    assert printed_by(PARTS[0]) == pytest.approx([0.501, 0.728], abs=2e-3)


def test_2_the_loss_by_hand_is_the_loss_of_the_settings(build):
    by_hand, plain = build('noise', 'Noise', model_type='x1', **POINTS), build('', model_type='x1', **POINTS)
    torch.manual_seed(0)
    batch = plain.prepare_batch_fn(plain.train_loader.take(range(64)), is_train=True)
    ours, theirs = (trainer.loss_fn(batch, lambda xt, t, label: 0.3 * xt) for trainer in (by_hand, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    noise = (0.3 * plain.process.compute_xt(batch.x0, batch.x1, plain.process(batch.t)) - batch.x1).square().mean(1)
    torch.testing.assert_close(ours, noise / (1 - batch.t) ** 2, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_3_samples_lie_on_the_ring_of_their_class(build):
    settings = dict(dataset='rings', network='mlp', channels=16, global_batch_size=256, num_training_steps=150)
    trainer = build('rings', 'Rings', **settings)
    (x, label), _ = DATASETS['rings'].load(trainer.config)
    radius = x.norm(dim=1)
    assert (radius[label == 0].mean(), radius[label == 1].mean()) == pytest.approx((0.3, 0.9), abs=0.01)
    inputs = trainer.sample_inputs(200)
    wrong = lambda x: trainer.sample_metrics(x, inputs)['wrong_ring']  # noqa: E731
    ring = torch.tensor([0.3, 0.9])[inputs.label][:, None] * torch.tensor([[0.6, 0.8]])
    assert wrong(ring) == 0 and wrong(ring[:, :1].flip(0) * 0 + 0.6) == 1
    trainer.train_loop()
    model_fn = trainer.get_model_fn(trainer.network)
    assert wrong(trainer.draw(model_fn, inputs, 'heun', num_steps=20)) < 0.25


@pytest.mark.parametrize('setting', ['fade_prob', 'labelled_prob'])
def test_4_only_chosen_images_fade_and_samples_ask_for_none(build, setting):
    trainer = build('fade', 'Fade', **{setting: 0.5})
    torch.manual_seed(0)
    x = torch.rand(2000, 1, 8, 8)
    faded, changed = trainer.augmenter(x)
    factor = (faded / x).flatten(1).mean(1)
    assert (factor[~changed] == 1).all() and changed.float().mean() == pytest.approx(0.5, abs=0.04)
    assert 0.3 <= factor[changed].min() < 0.35 and factor[changed].mean() == pytest.approx(0.65, abs=0.02)
    has_label = setting == 'labelled_prob'
    if has_label:
        torch.testing.assert_close(trainer.augmenter.condition(x)['augmentation'][:, 0], 1 - factor)
    assert trainer.sample_metrics(x, trainer.sample_inputs(2000))['ink'] == pytest.approx(float(x.mean()))
    inputs = trainer.sample_inputs(4)
    assert ('augmentation' in inputs.cond) == has_label and not any(map(torch.any, inputs.cond.values()))


def test_5_the_process_is_exact(load):
    process = load('polynomial').Polynomial()
    t = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
    coefs, h = process(t), 1e-6
    torch.testing.assert_close(coefs.alpha**2 + coefs.sigma**2, torch.ones_like(t))
    for name in ('alpha', 'sigma'):
        slope = (getattr(process, name)(t + h) - getattr(process, name)(t - h)) / (2 * h)
        torch.testing.assert_close(getattr(coefs, f'{name}_dot'), slope, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(process.time_of_log_snr(process.log_snr(t)), t, rtol=1e-6, atol=1e-9)
    assert process.sigma(t.float()).double().sub(coefs.sigma).div(coefs.sigma).abs().max() < 3e-7  # also in float32
    x0, x1 = torch.randn(2, 200, 3, dtype=torch.float64)
    xt = process.compute_xt(x0, x1, coefs)
    velocity = coefs.alpha_dot[:, None] * x0 + coefs.sigma_dot[:, None] * x1
    for kind, value in dict(x0=x0, x1=x1, velocity=velocity).items():
        found = Prediction(xt, coefs, **{kind: value})
        torch.testing.assert_close(found.v, coefs.alpha[:, None] * x1 - coefs.sigma[:, None] * x0, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.x0, x0, rtol=1e-6, atol=1e-6)
    assert max(printed_by(SOLUTIONS['polynomial'])) < 1e-12


def test_6_the_solver_has_order_3(load):
    """For Gaussian data of standard deviation 1/2, x(t) / std(t) is constant: x(0) is x1 / 2."""
    load('kutta')
    process = get_process(Config())
    std = lambda t: (((1 - t) / 2) ** 2 + t**2) ** 0.5  # noqa: E731
    x1 = torch.randn(100, 2, dtype=torch.float64)

    def velocity(x, t, label):
        return x * ((t - (1 - t) / 4) / std(t) ** 2)[:, None]

    def error(n):
        x = sample(velocity, process, x1, solver='kutta', num_steps=n, time_grid='uniform', t_min=0.0, t_max=1.0)
        return (x - x1 / 2).abs().max()

    assert error(20) / error(40) == pytest.approx(8, rel=0.1)
    assert SOLVERS['kutta'].nfe == 3
    errors = printed_by(SOLUTIONS['kutta'])
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([8, 8], rel=0.1)


@pytest.mark.slow
def test_7_pairs_of_optimal_transport_cost_less_and_no_swap_improves_them(build):
    trainer = build('ot', 'Coupled', label_dropout=1.0, **POINTS)
    torch.manual_seed(0)
    x0, x1 = trainer.train_loader.take(range(64))[0], torch.randn(64, 2)
    paired = trainer.couple(x0, x1, None)
    assert {tuple(row) for row in paired.tolist()} == {tuple(row) for row in x1.tolist()}
    cost = torch.cdist(x0, paired).square()
    own = cost.diagonal()
    assert (cost + cost.T >= own[:, None] + own - 1e-5).all() and own.sum() < 0.7 * (x0 - x1).square().sum()
    trainer.train_loop()
    by_chance = build('ot', 'Coupled', label_dropout=1.0, coupling='chance', experiment_name='chance', **POINTS)
    by_chance.train_loop()
    costs = [record_of(run.config.run_dir)[-1]['train/pair_cost'] for run in (trainer, by_chance)]
    assert costs[0] < 0.7 * costs[1] and by_chance.couple(x0, x1, None) is x1


@pytest.mark.slow
def test_8_the_trainer_from_scratch_learns_and_samples_as_the_plain_one(build):
    scratch, plain = build('scratch', 'Scratch', **POINTS), build('', **POINTS)
    for trainer in (scratch, plain):
        trainer.train_loop()
    for mine, theirs in zip(*(record_of(run.config.run_dir) for run in (scratch, plain)), strict=True):
        assert mine.items() <= theirs.items() and theirs.keys() - mine.keys() <= {'train/augmented'}
    inputs = scratch.sample_inputs(50)
    model_fn = scratch.get_model_fn(scratch.network)
    theirs = plain.draw(model_fn, inputs, 'euler', num_steps=2, time_grid='uniform')
    torch.testing.assert_close(scratch.by_hand(model_fn, inputs), theirs, rtol=1e-5, atol=1e-5)
