"""export.py: a folder that draws the samples of its run with torch and safetensors only; what it refuses."""

import ast
import dataclasses
import importlib
import json
import subprocess
import sys
from importlib.metadata import requires

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from config import SettingError
from main import build, load_run
from networks import NETWORKS
from prediction import ROWS
from processes import PROCESSES, RectifiedFlow
from sampling import TIME_GRIDS
from scripts import export as program
from scripts.export import Export
from tests.helpers import ROOT, slow_but
from tests.test_promises import scramble
from trainer import ExampleDiffusionTrainer
from training import run_record
from training.experiment import SampleInputs

NEEDED = [text.split(';')[0].split('>')[0].replace('-', '_') for text in requires('torch') or () if 'Linux' not in text]
ALLOWED = {'torch', 'torchgen', 'mpmath', *NEEDED, 'safetensors', *sys.stdlib_module_names}
BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] not in ALLOWED:
            raise ModuleNotFoundError(f'{name} is blocked', name=name)

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, '.')
"""
DRAW = """
import runpy, torch, sample
from safetensors.torch import load_file

given = load_file(sys.argv[1])
torch.save(sample.sample(*sample.load(), given['x1'], given['label'], 12), 'drawn.pt')
sys.argv = ['sample.py', '--num', '4', '--steps', '2', *sys.argv[2:]]
runpy.run_path('sample.py', run_name='__main__')
"""
GUIDED = dict(label_dropout=0.1, guidance_scale=3.0, guidance_interval=(0.1, 0.8), guidance_rescale=0.5)
RUNS = {  # a run of each network of the table
    'unet': dict(attention_resolutions=(4,), geometric_prob=0.2, process_name='cosine', model_type='v'),
    'dit': dict(network='dit', dit_depth=2, dit_width=32, dit_heads=2, dit_patch=3, checkpointing=True, **GUIDED),
    'mlp': dict(network='mlp', dataset='moons'),
}
OUTPUTS = [  # process, output, form of the time, grid; with the second and the fifth samples start late
    ('rf', 'x0', 't', 'logistic'),
    ('rf', 'x1', 'log_snr', 'logistic'),
    ('cosine', 'v', 'log_snr', 'uniform'),
    ('ve', 'F', 'log_snr', 'edm'),
    ('linear_vp', 'velocity', 't', 'log_snr'),
    ('linear_vp', 'score', 't', 'cosine'),
    ('rf', 'velocity', 't', 'logistic'),  # from t = 1 to t = 0
]


def made(config, trainer_class=ExampleDiffusionTrainer):
    """The folder of a run at step 0, whose network has weights that make every layer matter."""
    trainer = build(config, trainer_class)
    for seed, network in enumerate(trainer.weights().values()):
        scramble(network, seed, 0.1)
    run_record.write_start(config, trainer_class, trainer.device)
    trainer.checkpoints.save(0, wait=True)
    return config.run_dir


def drawn(run, n=6):
    """(inputs, x0) of the run, by the solver of the exported file."""
    trainer = load_run(run)
    classes, x1 = trainer.data.num_classes, torch.randn(n, *trainer.shape, generator=torch.Generator().manual_seed(0))
    inputs = SampleInputs(x1, torch.arange(n) % classes)
    with torch.no_grad():
        x0 = trainer.draw(trainer.get_model_fn(trainer.network), inputs, program.SOLVER, num_steps=12)
    return inputs, x0


def assert_same(exported, own):
    """The same samples up to rounding, which differ from each other by much more."""
    tolerance = 1e-4 * float(own.abs().max())
    assert own.std(0).max() > 50 * tolerance
    torch.testing.assert_close(exported, own, rtol=0, atol=tolerance)


@pytest.mark.parametrize('network', slow_but(['unet'], NETWORKS))
def test_every_network_draws_its_samples_where_the_project_and_other_packages_cannot_be_imported(
    tiny_config, tmp_path, network
):
    run, out = made(tiny_config(**RUNS[network])), tmp_path / 'out'
    inputs, x0 = drawn(run)
    program.main(['--run', str(run), '--out', str(out)])
    save_file({'x1': inputs.x1, 'label': inputs.label}, tmp_path / 'given.safetensors')
    code = f'ALLOWED = {ALLOWED | {path.stem for path in out.glob("*.py")}}\n{BLOCK}{DRAW}'
    command = [sys.executable, '-I', '-c', code, tmp_path / 'given.safetensors', '--labels', '1,0']
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert_same(torch.load(out / 'drawn.pt'), x0)
    samples = torch.load(out / 'samples.pt')
    assert samples['x'].shape == (4, *inputs.x1.shape[1:]) and (out / 'samples.png').exists() == (network != 'mlp')
    assert samples['label'].tolist() == [1, 0, 1, 0]
    if network != 'mlp':
        row = np.concatenate(list(samples['x'][:, 0].numpy()), 1).repeat(4, 0).repeat(4, 1)
        assert np.array_equal(np.array(Image.open(out / 'samples.png')), (row * 255).round().astype(np.uint8))


@pytest.mark.parametrize('process, output, time_input, grid', OUTPUTS)
def test_every_process_and_output_draws_the_samples_of_its_run(
    tiny_config, tmp_path, monkeypatch, process, output, time_input, grid
):
    assert {names[0] for names in OUTPUTS} == PROCESSES.keys() and {names[1] for names in OUTPUTS} == ROWS.keys()
    settings = dict(process_name=process, model_type=output, time_input=time_input, time_grid=grid)
    settings |= dict(t_min=0.0, t_max=1.0) if (process, output) == ('rf', 'velocity') else {}
    run, out = made(tiny_config(**RUNS['mlp'], **settings)), tmp_path / 'out'
    inputs, x0 = drawn(run)
    program.export(Export(str(run), str(out)))
    monkeypatch.syspath_prepend(out)
    for name in ('sample', 'residual_mlp'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    exported = importlib.import_module('sample')
    network, model = exported.load()
    assert_same(exported.sample(network, model, inputs.x1, inputs.label, 12), x0)
    assert model.starts_late == ((process, output) in (('rf', 'x1'), ('linear_vp', 'velocity'), ('linear_vp', 'score')))
    for wrong, words in (
        (dict(steps=7), 'must divide 240'),
        (dict(steps=-20), 'must divide 240'),
        (dict(scale=2.0), 'label_dropout'),
    ):
        with pytest.raises(ValueError, match=words):
            exported.sample(network, model, inputs.x1, inputs.label, **wrong)


def test_the_card_and_what_the_file_imports(tiny_config, tmp_path):
    run, out = made(tiny_config(**RUNS['mlp'], label_dropout=0.3)), tmp_path / 'out'
    (run / 'metrics.jsonl').write_text(
        '{"train/step": 0, "final/adams/frechet": 1.25}\n{"train/step": 9, "eval/loss": 7}\n'
    )
    program.export(Export(str(run), str(out)))
    card, start = (out / 'README.md').read_text(), run_record.read_start(run)
    for text in (
        '| label_dropout | `0.3` |',
        '| final/adams/frechet | `1.25` |',
        str(start['commit']),
        'residual_mlp.py',
    ):
        assert text in card
    assert 'eval/loss' not in card  # a later step's
    assert {path.name for path in out.iterdir()} == set(
        'README.md model.json model.safetensors sample.py residual_mlp.py unet.py utils.py'.split()
    )
    text = (out / 'sample.py').read_text()
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {name for node in nodes for name in [getattr(node, 'module', None) or node.names[0].name]}
    assert {name.split('.')[0] for name in modules} - sys.stdlib_module_names == {'torch', 'safetensors'}
    assert len(text.splitlines()) < 100
    model = json.loads((out / 'model.json').read_text())
    assert len(model['times']) == 241 and model['steps'] == 2


def test_a_grid_whose_times_depend_on_the_number_of_steps_is_refused(tiny_config, tmp_path, monkeypatch):
    def grid(process, start, end, n):
        return torch.linspace(0, 1, n + 1, dtype=torch.float64) ** (1 + 1 / n) * (end - start) + start

    monkeypatch.setitem(TIME_GRIDS, 'own', grid)
    run = made(tiny_config(**RUNS['mlp'], time_grid='own'))
    with pytest.raises(SettingError, match='a time grid that depends on the number of steps'):
        program.export(Export(str(run), str(tmp_path / 'out')))
    assert not (tmp_path / 'out').exists()


def test_safetensors_is_imported_only_by_the_export():
    files = [path for path in ROOT.rglob('*.py') if not {'tests', '.venv'} & set(path.relative_to(ROOT).parts)]
    users = [path.name for path in files if 'from safetensors' in path.read_text()]
    assert sorted(users) == ['export.py', 'standalone.py']


class OwnHooks(ExampleDiffusionTrainer):
    def encode(self, x):
        return x - 0.5

    def draw(self, model_fn, inputs, solver):
        return inputs.x1


class Conditions(ExampleDiffusionTrainer):
    def prepare_batch_fn(self, batch, is_train):
        prepared = super().prepare_batch_fn(batch, is_train)
        return dataclasses.replace(prepared, cond={'ink': prepared.t})


class Data(ExampleDiffusionTrainer):
    independent = False


class Uniform(RectifiedFlow):
    def sample_base(self, x0_like):
        return torch.rand_like(x0_like)


class OwnLoss(ExampleDiffusionTrainer):
    def loss_fn(self, batch, model_fn):
        return 2 * super().loss_fn(batch, model_fn)


@pytest.mark.parametrize(
    'trainer_class, settings, words',
    [
        (OwnHooks, {}, 'its own encode; its own draw'),
        (Conditions, {}, 'conditions: ink'),
        (Data, {}, 'an x1 that is data'),
        (ExampleDiffusionTrainer, dict(process_name='uniform'), r'noise other than N\(0, I\)'),
        (ExampleDiffusionTrainer, dict(network='mine'), "a network of its own, 'mine'"),
        (OwnLoss, {}, ''),
    ],
)  # fmt: skip
def test_what_the_file_cannot_draw_is_refused_by_name_before_anything_is_written(
    tiny_config, tmp_path, monkeypatch, trainer_class, settings, words
):
    monkeypatch.setitem(PROCESSES, 'uniform', lambda config: Uniform())
    monkeypatch.setitem(
        NETWORKS, 'mine', lambda config, shape, classes, cond=None: NETWORKS['mlp'](config, shape, classes, cond)
    )
    run, out = made(tiny_config(**(RUNS['mlp'] | settings)), trainer_class), tmp_path / 'out'
    if not words:
        program.export(Export(str(run), str(out)))
        assert (out / 'sample.py').exists()
        return
    with pytest.raises(SettingError, match=words):
        program.export(Export(str(run), str(out)))
    assert not out.exists()


def test_latents_a_full_folder_and_a_missing_package(tiny_config, tmp_path, monkeypatch):
    run = made(tiny_config(**RUNS['mlp']))
    exported = program.Exported(Export(str(run), ''))
    exported.run.data = dataclasses.replace(exported.run.data, mean=(0.0, 0.0))
    with pytest.raises(SettingError, match='latents, whose decoder'):
        exported.refuse()
    with pytest.raises(SettingError, match='already exists'):
        program.export(Export(str(run), str(run)))
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(SettingError, match='pip install safetensors'):
        program.export(Export(str(run), str(tmp_path / 'out')))
