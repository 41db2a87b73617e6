"""Export a trained network: its weights as safetensors, its source, a card, and a file that draws samples from them.

    sh run.sh export.py --run ckpts/NAME --out DIR
    python DIR/sample.py --num 20 --out samples

The folder needs nothing of this project: sample.py, a copy of standalone.py, imports only torch and safetensors.
What it does not know is refused before anything is written: an experiment's own network, encode, decode, draw or
sample_inputs; conditions, pairs and latents.
"""

import ast
import dataclasses
import importlib.util
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from config import SettingError
from runtime import command, files
from runtime.files import ROOT

STEPS = 240  # steps between the first and the last time in model.json: samples may take any number that divides it
SOLVER = 'dpmpp_2m'  # the solver of standalone.py
OWN_HOOKS = ('encode', 'decode', 'draw', 'sample_inputs', 'get_model_fn')  # hooks of sampling
CARD = """# {name}

A diffusion model: {network}, {parameters:,} parameters, for data of shape {shape}. Weights: {weights}, after {step}
steps. `python sample.py` draws samples (`--help` lists its flags); it needs only torch and safetensors.

| file | contents |
|---|---|
| `model.safetensors` | the weights |
| `model.json` | the network's arguments, the classes, and the path from noise to data |
| `sample.py` | loads the network and draws samples |
| {sources} | the network's source |

Data: {data}. Classes: {classes}.

## Settings that differ from the defaults

{settings}

## Numbers of the run

They are of the weights `{judged}`, drawn by the run's own samplers; `sample.py` draws with `dpmpp_2m`.

{numbers}

## Origin

{origin}
"""


@dataclasses.dataclass(frozen=True)
class Export:
    """Export a trained network as a folder that samples without this project."""

    run: str
    """Folder of the run, or one of its .pt files."""
    out: str
    """Folder to write; it must be new or empty."""
    weights: str = 'ema'
    """ema (the run's first moving average), another by its name (ema_0.999), raw, or posthoc_0.1 (docs/numbers.md)."""
    trust: bool = False
    """Run the code that the run names, even if it is outside the project and the folder you are in."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and export."""
    options = command.options(Export, argv, __doc__, 'run', 'out')
    command.run(lambda: export(options))


def export(options: Export) -> None:
    """Write the folder. Raises SettingError if the run cannot be exported, before anything is written."""
    if importlib.util.find_spec('safetensors') is None:
        raise SettingError('export.py needs the package safetensors. Install it: pip install safetensors')
    from safetensors.torch import save

    out = Path(options.out).expanduser()
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise SettingError(f'out={options.out!r} already exists. Pass another --out, or remove it.')
    exported = Exported(options)
    exported.refuse()
    net, source = exported.net, dict(sources(type(exported.net)))
    text = {'model.json': json.dumps(exported.model()), 'sample.py': (ROOT / 'scripts/standalone.py').read_text()}
    text |= source | {'README.md': exported.card(list(source))}
    out.mkdir(parents=True, exist_ok=True)
    weights = save({name: x.cpu().contiguous() for name, x in net.state_dict().items()})
    (out / 'model.safetensors').write_bytes(weights)
    for name, content in text.items():
        files.write_text(out / name, content)
    which = f'{options.run} at step {exported.run.step}, weights {options.weights}'
    print(f'{which}: exported. Draw samples with: python {out}/sample.py')
    if exported.run.overrides('samplers'):
        print('this run has its own samplers, which are not part of the export: sample.py draws by plain dpmpp_2m')


class Exported:
    """A run, read-only, and what its export says about it."""

    def __init__(self, options: Export):
        from main import load_run

        self.options = options
        self.run = load_run(options.run, options.weights, trust=options.trust, compile='off')

    @property
    def net(self) -> Any:  # without the scaling of its input
        return self.run.network.net

    def refuse(self) -> None:
        """Raise SettingError, which names what of this run cannot be exported, if there is anything."""
        from networks import NETWORKS, ScaledNetwork

        run = self.run
        data, cond = run.data, run.batches.shape_example.cond.keys() - {'augmentation'}
        builder = inspect.getsourcefile(NETWORKS[run.config.network])
        is_ours = type(run.network) is ScaledNetwork and builder == str(ROOT / 'networks/table.py')
        reasons = [f'its own {hook}' for hook in OWN_HOOKS if run.overrides(hook)]
        reasons += [] if is_ours else [f'a network of its own, {run.config.network!r}']
        reasons += [f'conditions: {", ".join(sorted(cond))}'] if cond else []
        reasons += ['latents, whose decoder is not part of the run'] if data.mean else []
        reasons += [] if run.independent else ['an x1 that is data, or depends on x0']
        reasons += [] if run.drawing.base_is_normal else ['noise other than N(0, I)']
        reasons += [] if self.grid_is_nested() else ['a time grid that depends on the number of steps']
        if reasons:
            what = f'{self.options.run} has {"; ".join(reasons)}, which the exported sample.py does not know'
            raise SettingError(f'{what}. Draw its samples with generate.py.')

    def times(self, steps: int) -> list[float]:
        """The times of a solver with this number of steps."""
        from solvers import Steps, shift_of

        c, process, shift = self.run.config, self.run.process, shift_of(self.run.shape)
        return Steps(SOLVER, steps, 0, c.time_grid, c.t_min, c.t_max, shift).times(process, process, c.model_type)

    def grid_is_nested(self) -> bool:
        """True if a solver with fewer steps visits only times that a solver with STEPS steps visits."""
        fine = self.times(STEPS)
        pairs = ((self.times(STEPS // n), fine[::n]) for n in range(1, STEPS) if STEPS % n == 0)
        return all(math.isclose(a, b, abs_tol=1e-6) for few, every in pairs for a, b in zip(few, every, strict=True))

    def model(self) -> dict[str, Any]:
        """The contents of model.json."""
        c, data, net = self.run.config, self.run.data, self.net
        steps = c.sample_nfe or c.num_sample_steps
        has_classes = data.num_classes > 0 and c.label_dropout < 1
        return dict(
            module=type(net).__module__.rpartition('.')[2],
            network=type(net).__name__,
            arguments=net.arguments,
            shape=self.run.shape,
            are_images=data.scale == 'image',
            classes=data.classes,
            labels=data.trained_classes if has_classes else (),
            has_null_class=has_classes and c.label_dropout > 0,
            steps=min((n for n in range(1, STEPS + 1) if STEPS % n == 0), key=lambda n: abs(n - steps)),
            guidance_scale=float(c.guidance_scale),
            guidance_interval=c.guidance_interval,
            guidance_rescale=c.guidance_rescale,
            **self.path(),
        )

    def path(self) -> dict[str, Any]:
        """The times from noise to data, each with the constants of an evaluation and of the solver. Every prediction
        type is linear: x0 = p xt + q output."""
        import torch

        from networks import ScaledNetwork
        from prediction import get_model_convert_fn

        c, process, network = self.run.config, self.run.process, cast(ScaledNetwork, self.run.network)
        times = torch.tensor(self.times(STEPS), dtype=torch.float64)
        coefs, seen = process(times), times.float()  # the network is trained with times in float32
        one, convert = torch.ones(len(times), dtype=torch.float64), get_model_convert_fn(c.model_type)
        p, q = convert(0 * one, times, one, coefs).x0, convert(one, times, 0 * one, coefs).x0
        columns = dict(t=times, time=network.time_input(seen, network.process), c_in=network.process(seen).c_in)
        columns |= dict(alpha=coefs.alpha, sigma=coefs.sigma, l=coefs.log_snr / 2, p=p, q=q)
        rows = zip(*(x.tolist() for x in columns.values()), strict=True)
        late = bool(times[0] < c.t_max)
        return dict(starts_late=late, times=[dict(zip(columns, row, strict=True)) for row in rows])

    def card(self, source: Sequence[str]) -> str:
        """README.md of the folder."""
        from reports import page

        run = self.run

        def table(head: str, values: dict[str, Any]) -> str:
            return '\n'.join([f'| {head} | value |', '|---|---|', *(f'| {a} | `{b}` |' for a, b in values.items())])

        saved = page.read(run.config.run_dir)
        saved.lines = [line for line in saved.lines if line['train/step'] <= run.step]
        numbers = {name: f'{value:.4g}' for name, value in saved.final().items() if isinstance(value, (int, float))}
        start = [start for start in saved.starts if start['step'] <= run.step][-1]
        origin = {name: start[name] for name in ('commit', 'command', 'time')} | start['versions']
        origin['commit'] = f'{origin["commit"]}{" with changes" if start["diff"] else ""}'
        classes = run.config.label_dropout < 1 and (', '.join(run.data.classes) or run.data.num_classes)
        return CARD.format(
            name=run.config.run_dir.name,
            network=run.config.network,
            parameters=sum(p.numel() for p in run.network.parameters()),
            shape=' x '.join(map(str, run.shape)),
            weights=self.options.weights,
            step=run.step,
            sources=', '.join(f'`{name}`' for name in source),
            data=run.config.dataset,
            classes=classes or 'none',
            settings=table('setting', {'preset': saved.config['preset']} | saved.changed()),
            numbers=table('number', numbers) if numbers else 'None were recorded.',
            judged=f'ema_{run.config.ema_decays[0]:g}' if run.config.ema_decays else 'raw',
            origin=table('', origin),
        )


def sources(network: type) -> Iterator[tuple[str, str]]:
    """(file name, text) of a network's source and of what it imports from this project; of utils.py only functions."""
    import utils

    waiting, seen, used = [network.__module__], set[str](), set[str]()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        text = (ROOT / module.replace('.', '/')).with_suffix('.py').read_text()
        yield f'{module.rpartition(".")[2]}.py', text
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module:
                if node.module == utils.__name__:
                    used |= {alias.name for alias in node.names}
                elif (ROOT / f'{node.module}.py').exists() and node.module not in seen:
                    waiting.append(node.module)
    functions = [inspect.getsource(getattr(utils, name)) for name in sorted(used)]
    head = '"""Helpers of the network."""\n\nimport torch\nfrom torch import Tensor\n'
    yield 'utils.py', '\n\n'.join([head, *functions])


if __name__ == '__main__':
    main()
