"""What README.md tells a newcomer to type works."""

import ast
import re
import shlex

import pytest
from conftest import ROOT

from config import Config, parse_config

README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', README, re.S)
COMMANDS = sorted(
    {
        re.sub(r'^\w+=\S+ ', '', line.split('#')[0].strip())
        for language, block in BLOCKS
        if language == 'sh'
        for line in block.splitlines()
    }
)
SNIPPETS = [block for language, block in BLOCKS if language == 'python']


@pytest.mark.parametrize('command', [c for c in COMMANDS if c.startswith('sh run.sh')])
def test_flags_of_every_command(command):
    words = shlex.split(command)[2:]
    if '--help' not in words:
        parse_config(words)


def test_other_commands_are_files_that_exist():
    for command in COMMANDS:
        assert (ROOT / shlex.split(command)[1]).is_file(), command


def test_every_setting_named_in_a_table_exists():
    rows = re.findall(r'^\| (`\w+`(?:, `\w+`)*) \|.*\|.*\|$', README, re.M)
    names = {name for row in rows for name in re.findall(r'`(\w+)`', row)}
    assert len(names) > 15 and names <= Config.__dataclass_fields__.keys()


def test_every_file_is_in_the_table():
    for path in ROOT.glob('*.py'):
        assert f'`{path.name}`' in README, path.name


def test_every_test_of_the_reliability_table_exists():
    table = README[README.index('## Reliability') : README.index('Exit codes:')]
    code = ''.join(path.read_text() for path in (ROOT / 'tests').glob('test_*.py'))
    names = re.findall(r'`(test_\w+)`', table)
    assert len(names) > 25
    for name in names:
        assert f'def {name}(' in code, name


def test_pictures_exist():
    for path in re.findall(r'!\[.*?\]\((.*?)\)', README):
        assert (ROOT / path).stat().st_size > 1000


def test_loss_snippet_is_the_code():
    """The first snippet is what trainer.py runs, line for line."""
    code = {line.strip() for line in (ROOT / 'trainer.py').read_text().splitlines()}
    assert all(line in code for line in SNIPPETS[0].splitlines())


def test_snippets_run(tmp_path, build_trainer, tiny_config):
    """Every snippet after the first: a trainer that trains, entries that work, samples from a checkpoint."""
    import torch

    import networks
    import processes
    import sampling
    import solvers
    import unet

    for snippet in SNIPPETS:
        ast.parse(
            snippet if 'return self.loss' not in snippet else 'def f(self):\n    ' + snippet.replace('\n', '\n    ')
        )
    spaces = dict(vars(processes)) | dict(vars(solvers)) | dict(vars(networks))
    loss, process, _, _, solver, grid, samples, likelihood, floor, replay = SNIPPETS[1:]
    names = {}
    exec(loss.replace("if __name__ == '__main__':", 'if False:'), names)
    config = tiny_config(experiment_name='digits')
    trainer = build_trainer(config, names['MyTrainer'])
    trainer.train_loop()
    exec(process, spaces)
    exec(solver, spaces)
    quadratic = processes.PROCESSES.pop('quadratic')(config)
    t = torch.rand(3, dtype=torch.float64)
    assert torch.allclose(quadratic(t).alpha_dot, -2 * t)
    x1 = torch.randn(4, 1, 8, 8)
    try:
        x = sampling.sample(lambda xt, t, label: torch.zeros_like(xt), quadratic, x1, solver='ralston', num_steps=3)
    finally:
        del solvers.SOLVERS['ralston']
    assert torch.allclose(x, 0.999 * x1)
    names = {}
    exec(samples.replace('ckpts/digits', str(config.run_dir)), names)
    assert names['x'].shape == (20, 1, 8, 8) and isinstance(names['network'].net, unet.UNet)
    exec(grid, vars(sampling).copy())
    times = sampling.TIME_GRIDS.pop('quadratic')(None, 0.9, 0.1, 4)
    assert torch.allclose(times, torch.tensor([0.9, 0.55, 0.3, 0.15, 0.1], dtype=torch.float64))
    exec(likelihood, names)
    exec(floor, names)
    x0, t = names['x0'], torch.full((4,), 0.01)
    assert torch.allclose(names['perfect'](0.99 * x0, t, None), x0)
    assert names['result'].log_prob.shape == (4,)
    fresh = tiny_config(experiment_name='replay')
    exec(
        replay.replace("parse_config(['--experiment_name', 'copy'])", 'config').replace('1234', '5'),
        names := names | dict(config=fresh, MyTrainer=type(trainer)),
    )
    assert names['trainer'].step == 5 and names['losses'].isfinite().all()
