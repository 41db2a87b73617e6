"""README.md and docs/: everything that they tell a reader to type works, and every link leads somewhere."""

import ast
import importlib.util
import itertools
import math
import re
import shlex
import shutil
import sys
import types
from typing import NamedTuple

import pytest
import torch
import tyro

from config import PRESETS, Config, parse_config
from scripts.evaluate import Evaluate
from scripts.export import Export
from scripts.generate import Generate
from scripts.prepare import PrepareConfig
from scripts.sweep import combinations
from settings.flags import refuse
from tests.helpers import ROOT, TINY, as_flags, record_of
from tests.test_layers import WINGS

OPTIONS = {'generate.py': Generate, 'evaluate.py': Evaluate, 'export.py': Export}  # programs for a run
TEXTS = ROOT / 'README.md', *ROOT.glob('examples/*.md'), *ROOT.glob('docs/*.md')
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in TEXTS}


class Block(NamedTuple):
    page: str
    name: str  # its heading and its number under that heading, as 'a-loss-1'
    language: str
    code: str
    comment: str  # the HTML comment on the line before, which no reader sees
    command: str  # the first `sh run.sh mine.py ...` between it and the next block


def anchor(heading: str) -> str:
    """The anchor that GitHub makes from a heading."""
    return re.sub(r'[^\w\- ]', '', heading.strip().lower()).replace(' ', '-')


def blocks_of(page: str) -> list[Block]:
    text, found, under = PAGES[page], [], {}
    fences = list(re.finditer(r'^(<!--.*-->\n)?```(\w*)\n(.*?)^```$', text, re.S | re.M))
    for fence, following in itertools.zip_longest(fences, fences[1:]):
        heading = anchor(re.findall(r'^#+ (.*)$', text[: fence.start()], re.M)[-1])
        under[heading] = under.get(heading, 0) + 1
        after = text[fence.end() : following.start() if following else None]
        command = re.search(r'`(sh run\.sh mine\.py[^`]*)`', after)
        comment, language, code = fence.groups()
        name = f'{heading}-{under[heading]}'
        found.append(Block(page, name, language, code, comment or '', command[1] if command else ''))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == 'python']
HEART = PYTHON[0]
COMMANDS = sorted(  # without variables before them; a Slurm job as the run that it starts
    {
        re.sub(
            r'^(\w+=\S+ )+|^sbatch (-\S+ )*launch/slurm\.sh(?=.*\w)',
            lambda m: '' if m[1] else 'sh run.sh',
            line.split('#')[0].strip(),
        )
        for block in BLOCKS
        if block.language == 'sh'
        for line in block.code.replace('\\\n', ' ').splitlines()
        if line.split('#')[0].strip()
    }
)

# ---------------------------------------------------------------- text


def test_readme_is_short():
    assert len(PAGES['README.md'].splitlines()) < 180


@pytest.mark.parametrize('command', [c for c in COMMANDS if c.startswith('sh run.sh')])
def test_flags_of_every_command(command):
    words = shlex.split(command)[2:]
    if '--help' in words:
        return
    words = words or ['']
    if words[0] == 'sweep.py':
        assert combinations(words[1:])
    elif words[0] == 'compare.py':
        assert len(words) > 2
    elif words[0] in OPTIONS:
        tyro.cli(OPTIONS[words[0]], args=words[1:], use_underscores=True)
    else:
        program = words[0] in ('', 'prepare.py') or words[0].startswith('examples/')
        config = parse_config(words[program:], PrepareConfig if words[0] == 'prepare.py' else Config)
        if not program:
            refuse(config, words, PRESETS)


def test_other_commands_are_files_that_exist():
    assert len(COMMANDS) > 10
    for command in COMMANDS:
        assert (ROOT / shlex.split(command)[1]).is_file(), command


def test_every_setting_named_in_a_table_exists():
    rows = re.findall(r'^\| (`\w+`(?:, `\w+`)*) \|.*\|.*\|$', PAGES['docs/settings.md'], re.M)
    names = {name for row in rows for name in re.findall(r'`(\w+)`', row)}
    assert len(names) > 30 and names <= Config.__dataclass_fields__.keys()


def test_choices_of_a_setting_in_its_table_are_all_there_are():
    from main import choices

    rows = re.findall(r'^\| `(\w+)`[^|]*\|([^|]*)\|', PAGES['docs/settings.md'], re.M)
    named = {setting: set(re.findall(r'`(\w+)`', cell)) for setting, cell in rows}
    for setting in ('process_name', 'model_type', 'loss_weight', 'time_sampler', 'solver', 'time_grid', 'network'):
        assert named[setting] == set(choices()[setting]), setting


def test_the_tree_is_the_house():
    """There is a line for each file and folder at the top level, and none for one that does not exist."""
    tree = next(block for block in BLOCKS if block.page == 'README.md' and block.name.startswith('files'))
    named = set(re.findall(r'(?:^|  )(\w+\.\w+|\w+/)(?= )', tree.code, re.M))
    for name in named:
        assert (ROOT / name).exists(), name
    folders = {f'{name}/' for name in WINGS} | {'examples/', 'docs/', 'benchmarks/', 'tests/', 'data/', 'ckpts/'}
    assert named >= folders | {'run.sh'} | {path.name for path in ROOT.glob('*.py')}


def test_the_hour_has_the_lines_that_it_says():
    """The number is right to the nearest hundred."""
    text = re.search(r'\*\*The hour:\*\* .*?\n\n', PAGES['README.md'], re.S)[0]
    text, lines = text.partition('Then')[0], int(re.search(r'([\d,]+) lines', text)[1].replace(',', ''))
    files = re.findall(r'`([\w/]+\.py)`', text)
    assert files[0] == 'trainer.py' and len(files) == len(set(files)) > 5
    assert abs(sum(len((ROOT / file).read_text().splitlines()) for file in files) - lines) <= 50


def defines(file: str, name: str) -> bool:
    """Whether a file has a function, method, class or shell function of this name."""
    return bool(re.search(rf'^ *(def|class) {name}\b|^{name}\(\)', (ROOT / file).read_text(), re.M))


def test_inside_names_files_and_functions_that_exist():
    page = PAGES['docs/inside.md']
    sections = [re.findall(r'^\| (\d+) \| `([\w./]+)`(?: `(\w+)`)? \|', part, re.M) for part in page.split('\n## ')[1:]]
    assert [len(lines) for lines in sections] == [15, 8, 10, 10, 10, 6]
    for lines in sections:
        assert [int(number) for number, *_ in lines] == list(range(1, len(lines) + 1))
    named = [line[1:] for lines in sections for line in lines]
    named += [(file, name) for name, file in re.findall(r'`(\w+)`\s+in\s+`([\w/]+\.py)`', page)]
    assert len(named) > 50
    for file, name in named:
        assert not name or defines(file, name), f'{file} has no {name}'
    for file in re.findall(r'`([\w/]+\.(?:py|sh))`', page):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize(('page', 'least'), [('docs/reliability.md', 26), ('docs/symptoms.md', 10)])
def test_every_test_of_a_table_exists(page, least):
    code = ''.join(path.read_text() for path in (ROOT / 'tests').glob('**/test_*.py'))
    names = re.findall(r'`(test_\w+)`', PAGES[page])
    assert len(names) >= least
    for name in names:
        assert f'def {name}(' in code, name


@pytest.mark.parametrize('page', [page for page in PAGES if page.startswith('docs/')])
def test_a_page_begins_with_a_sentence_that_says_for_whom_it_is(page):
    title, head = PAGES[page].split('\n\n')[:2]
    assert title.startswith('# ') and re.fullmatch(r'For [^.]+\.', head), head


def test_the_index_leads_to_every_page():
    links = set(re.findall(r'\]\(([^)#]+)\)', PAGES['docs/README.md']))
    assert links >= {path.name for path in ROOT.glob('docs/*.md')} - {'README.md'}


def test_curves_of_presets_come_from_their_records():
    """Each number in the tables of docs/loss.md, as it is rounded there."""
    tables = re.findall(r'^The `(\w+)` preset[^|]*\n\n(\| step .*?)\n\n', PAGES['docs/loss.md'], re.S | re.M)
    assert [preset for preset, _ in tables] == ['digits', 'digits_long', 'fashion_mnist', 'small_images']
    for preset, table in tables:
        head, _, *rows = [[cell.strip(' `') for cell in line.strip('|').split('|')] for line in table.split('\n')]
        record = {line['train/step']: line for line in record_of(ROOT / 'docs/records' / preset)}
        for step, *cells in rows:
            for name, cell in zip(head[1:], cells, strict=True):
                if cell:
                    digits = len(cell.partition('.')[2])
                    assert abs(float(cell) - record[int(step)][name]) < 0.6 * 10**-digits, (preset, step, name)


@pytest.mark.parametrize('page', PAGES)
def test_links_and_pictures_exist(page):
    text = re.sub(r'^```.*?^```$', '', PAGES[page], flags=re.S | re.M)
    for target in re.findall(r'\]\(([^)]+)\)', text):
        if target.startswith('http'):
            continue
        path, _, part = target.partition('#')
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_dir() or file.stat().st_size > 0, target
        if part:
            assert part in [anchor(heading) for heading in re.findall(r'^#+ (.*)$', file.read_text(), re.M)], target


def test_loss_snippet_is_the_code():
    """The first block is the end of ExampleDiffusionTrainer.loss_fn, line for line."""
    code = [line.strip() for line in (ROOT / 'trainer.py').read_text().splitlines()]
    lines = HEART.code.splitlines()
    start = code.index(lines[0])
    assert len(lines) == 7 and code[start : start + 7] == lines
    assert any(line.startswith('def loss_fn(') for line in code[start - 5 : start])


@pytest.mark.parametrize('block', PYTHON, ids=lambda block: f'{block.page}:{block.name}')
def test_every_block_is_python(block):
    ast.parse(block.code if block is not HEART else f'def loss_fn(self):\n    {"    ".join(HEART.code.splitlines(1))}')


# ---------------------------------------------------------------- recipes: each is a file mine.py

RECIPES = [block for block in PYTHON if block.command]
SHORT = dict(num_training_steps=4, warmup_steps=1, log_every=2, save_every=2, eval_every=4, sample_every=0)


def keys_of(*names):
    return lambda trainer, module, record: set(names) <= record[-1].keys()


def ralston_has_order_2(trainer, module, record):
    """It is exact for a velocity 2 t, whose integral is t^2."""
    from processes import PROCESSES
    from sampling import sample

    x1 = torch.randn(4, 1, 8, 8)
    x = sample(lambda xt, t, label: 2 * t[0] + 0 * xt, PROCESSES['rf'](None), x1, solver='ralston', num_steps=3)
    return torch.allclose(x, 0.999 * x1 + 0.001**2 - 0.999**2, atol=1e-6)


def partners_are_nearer(trainer, module, record):
    x0, x1 = torch.randn(2, 32, 1, 8, 8)
    coupled = trainer.couple(x0, x1, None)
    same_noise = coupled.flatten(1).sum(1).sort().values.equal(x1.flatten(1).sum(1).sort().values)
    return same_noise and (x0 - coupled).norm() < (x0 - x1).norm() and not trainer.independent


def quadratic_times(trainer, module, record):
    times = module.quadratic(None, 0.9, 0.1, 4)
    return torch.allclose(times, torch.tensor([0.9, 0.55, 0.3, 0.15, 0.1], dtype=torch.float64))


def quadratic_derivative(trainer, module, record):
    t = torch.rand(3, dtype=torch.float64)
    return torch.allclose(trainer.process(t).alpha_dot, -2 * t)


def guided_by_its_conditions(trainer, module, record):
    inputs = trainer.sample_inputs(8)
    names = {'ink', 'text', 'outline'}
    nulls = []

    def model_fn(xt, t, label, **cond):
        nulls.append(
            (len(xt), bool((label[len(xt) // 2 :] == 10).all()), float(cond['ink'][len(xt) // 2 :].abs().max()))
        )
        return 0 * xt

    trainer.draw(model_fn, inputs, 'adams')
    return names == inputs.cond.keys() == trainer.example.cond.keys() and set(nulls) == {(16, True, 0)}


def restores_what_it_is_given(trainer, module, record):
    """The pictures show x1, which equals the true image where it is not cut off."""
    inputs = trainer.sample_inputs(3)
    (given,), truth = inputs.given, trainer.decode(inputs.truth)
    return given.equal(trainer.decode(inputs.x1)) and (given - truth)[:, :, :4].abs().mean() < 0.1 < given.std()


def fits_better(trainer, module, record):
    numbers = trainer.judge.samples(trainer.config.num_training_steps, 16)
    return numbers['final/fitted/rmse'] < 0.8 * numbers['final/free/rmse']


# name of a recipe -> what must be true of its trainer, its module and its record after a run
def learns_the_log_of_the_loss(trainer, module, record):
    """For losses whose mean at time t is known, u(t) becomes its logarithm."""
    torch.manual_seed(0)
    u = module.Uncertainty()
    optimizer, mean = torch.optim.Adam(u.parameters(), 1e-2), lambda t: 0.3 + t**2
    t = torch.rand(20_000)
    noisy = mean(t) * torch.rand(20_000) * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trainer.modules, 'u', u)
        patch.setattr(module.ExampleDiffusionTrainer, 'loss_fn', lambda self, batch, model_fn: batch.loss)
        for rows in torch.arange(20_000).split(100) * 2:
            optimizer.zero_grad()
            trainer.loss_fn(types.SimpleNamespace(t=t[rows], loss=noisy[rows]), None).mean().backward()
            optimizer.step()
    at = torch.linspace(0.1, 0.9, 9)
    return (u(at) - mean(at).log()).abs().max() < 0.2


EXPECTED = {
    'your-own-experiment-2': keys_of('train/mean_weight'),
    'a-loss-1': keys_of('train/rmse', 'eval/rmse', 'eval/rmse_ema_0.999', 'eval/reference'),
    'a-process-1': quadratic_derivative,
    'a-data-set-1': lambda trainer, module, record: trainer.shape == (1, 24, 24) and trainer.data.num_classes == 5,
    'points-and-other-floats-1': lambda trainer, module, record: trainer.shape == (2,),
    'points-and-other-floats-2': lambda trainer, module, record: trainer.example.x0.abs().max() == 1,
    'a-network-1': lambda trainer, module, record: type(trainer.network.net).__name__ == 'Small',
    'settings-of-your-own-1': lambda trainer, module, record: trainer.config.huber == 0.1,
    'a-solver-1': ralston_has_order_2,
    'a-time-grid-1': quadratic_times,
    'conditions-1': guided_by_its_conditions,
    'conditions-2': lambda trainer, module, record: trainer.sample_inputs(3).cond['text'].shape == (3, 16),
    'conditions-3': lambda trainer, module, record: trainer.sample_inputs(3).cond.keys() == {'ink', 'small'},
    'x1-is-data-1': restores_what_it_is_given,
    'x1-is-data-2': lambda trainer, module, record: not trainer.independent,
    'x1-is-data-3': lambda trainer, module, record: trainer.sample_inputs(3).label.tolist() == [3, 3, 3],
    'latents-1': lambda trainer, module, record: trainer.shape == (4, 4, 4),
    'coupling-1': partners_are_nearer,
    'several-networks-1': keys_of('train/critic', 'train/grad_norm_critic', 'eval/critic'),
    'several-networks-2': learns_the_log_of_the_loss,
    'several-networks-3': lambda trainer, module, record: 'teacher' in trainer.modules,
    'derivatives-and-a-second-time-1': lambda trainer, module, record: list(trainer.samplers()) == ['mean_flow'],
    'samplers-metrics-and-pictures-1': keys_of('samples/smallest_std'),
    'gradients-of-samples-1': fits_better,
}


@pytest.fixture
def restored_tables():
    """Remove what a recipe adds to the tables after its test."""
    from main import choices
    from reports.kinds import KINDS

    before = [(table, dict(table)) for table in (*choices().values(), KINDS)]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """`imported(code)`: the module of a file mine.py with this code."""

    def load(code: str):
        path = tmp_path / 'mine.py'
        path.write_text(code)
        spec = importlib.util.spec_from_file_location('mine', path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, 'mine', module)
        spec.loader.exec_module(module)
        return module

    return load


def write_arrays(folder):
    """The files that the recipe for arrays reads."""
    import numpy as np

    folder.mkdir()
    rng = np.random.default_rng(0)
    np.savez(folder / 'mine.npz', images=rng.integers(0, 256, (250, 1, 24, 24), np.uint8), labels=np.arange(250) % 5)


@pytest.mark.parametrize('block', RECIPES, ids=lambda block: block.name[-40:])
def test_recipe(block, tmp_path, build_trainer, imported, restored_tables):
    """It trains by the command below it, evaluates, draws, saves, and resumes from its checkpoint."""
    from reports import kinds

    write_arrays(tmp_path / 'data')
    module = imported(block.code)
    folders = dict(ckpt_dir=str(tmp_path / 'ckpts'), data_dir=str(tmp_path / 'data'))
    flags = as_flags(TINY | SHORT | folders) + shlex.split(block.command)[3:]
    config = parse_config(flags, getattr(module, 'MyConfig', Config))
    trainer = build_trainer(config, getattr(module, 'Mine', None))
    trainer.train_loop()

    record = record_of(config.run_dir)
    assert record[-1]['train/step'] == 4 and all(math.isfinite(line['train/loss']) for line in record)
    assert kinds.kind(trainer.decode(trainer.example.x0)) is None or list(
        config.run_dir.glob('samples/step_0000004_*.png')
    )
    if 'sample_metrics' in vars(type(trainer)):
        numbers = trainer.judge.samples(trainer.config.num_training_steps, 16)
        assert len(numbers) >= len(trainer.samplers()) and all(map(math.isfinite, numbers.values()))
    assert EXPECTED.get(block.name, lambda *_: True)(trainer, module, record)

    again = build_trainer(config, getattr(module, 'Mine', None))
    assert again.step == 4 and again.state().keys() == trainer.state().keys()
    for name, weights in trainer.modules.items():
        for mine, theirs in zip(weights.state_dict().values(), again.modules[name].state_dict().values(), strict=True):
            assert mine.equal(theirs), name


def test_every_recipe_that_is_expected_exists():
    assert EXPECTED.keys() <= {block.name for block in RECIPES}
    not_run = [block.name for block in blocks_of('docs/experiments.md') if block in PYTHON and block not in RECIPES]
    assert not_run == ['a-data-set-2'], 'each recipe needs a command below it, or a comment why it is not run'
    assert all(b.comment for b in PYTHON if b.name in not_run)


# ---------------------------------------------------------------- notebooks: the blocks of a page, one after the other


@pytest.fixture
def notebook(tmp_path, tiny_config, build_trainer, monkeypatch):
    """`notebook(page, old, new)`: runs the blocks of a page, `old` replaced by `new`, next to a run ckpts/digits."""
    import main

    main.train(tiny_config(experiment_name='digits', save_every=4, eval_every=4), None)
    monkeypatch.chdir(tmp_path)

    def run(page: str, old: str = '', new: str = '') -> dict:
        names = {'__name__': 'notebook'}
        for block in blocks_of(page):
            if block in PYTHON and block is not HEART and block != HEART and not block.command:
                exec(
                    compile(block.code.replace(old, new) if old else block.code, f'{page}:{block.name}', 'exec'), names
                )
        return names

    return run


def test_samples_in_a_notebook(notebook):
    import unet

    names = notebook('README.md')
    assert isinstance(names['trainer'].network.net, unet.UNet)
    assert names['pictures'].shape == (20, 1, 8, 8)
    assert names['pictures'].min() >= 0 and names['pictures'].max() <= 1


def test_sampling_page(notebook):
    names = notebook('docs/solvers.md')
    assert len(names['path']) == names['config'].num_sample_steps and names['x'].isfinite().all()
    assert names['result'].log_prob.shape == (4,) and names['floor'].isfinite().all()
    x0, t, process = names['x0'], torch.full((4,), 0.01), names['process']
    xt = process.compute_xt(x0, torch.zeros_like(x0), process(t))  # so close to a training image that it is the answer
    assert torch.allclose(xt - t[0] * names['perfect'](xt, t, names['labels']), x0, atol=1e-4)


def test_settings_page(notebook):
    assert [step for step, _ in notebook('docs/settings.md')['curve']] == [4, 8, 12]


def test_replay_of_a_bad_step(notebook, tmp_path):
    """Follows the numbered steps before the block: copies the folder, with the save before the last as last.pt."""
    import saving

    digits, replay = tmp_path / 'ckpts/digits', tmp_path / 'ckpts/replay'
    shutil.copytree(digits, replay)
    shutil.copy(replay / 'last-1.pt', replay / 'last.pt')
    before = {path.name: path.read_bytes() for path in replay.glob('*.*')}
    names = notebook('docs/reliability.md', '1234', '12')
    trainer, batch = names['trainer'], names['batch']
    assert trainer.step == 12 and names['losses'].isfinite().all()
    for name, weights in saving.load(digits / 'last.pt')['network'].items():  # the run's own weights at this step
        assert trainer.network.state_dict()[name].equal(weights), name
    again = trainer.batches.draw_shard(
        trainer.train_loader.take(shard_indices(trainer, 12)), trainer.config.batch_shards - 1, 12
    )
    end = slice(-len(again.t), None)  # the batch is the whole step: there is one micro-batch
    assert len(batch.t) == trainer.config.global_batch_size == trainer.config.batch_shards * len(again.t)
    assert batch.x0[end].equal(again.x0) and batch.t[end].equal(again.t) and batch.x1[end].equal(again.x1)
    assert {path.name: path.read_bytes() for path in replay.glob('*.*')} == before, 'reading wrote something'


def shard_indices(trainer, step):
    """Indices of the images in the last shard of a step."""
    trainer.batches.train_sampler.set_step(step)
    shards = iter(trainer.batches.train_sampler)
    return [next(shards) for _ in trainer.batches.train_sampler.my_shards][-1]
