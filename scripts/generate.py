"""Draw samples of a trained run, as PNGs in a folder or as one .npz.

    sh run.sh generate.py --run ckpts/NAME --num 50000 --out samples/
    NPROC=4 sh run.sh generate.py --run ckpts/NAME --num 50000 --out samples.npz --solver adams --nfe 20

The noise of sample i is a function of (seed, i), so a sample is the same, up to float32 rounding, for any number of
processes and any batch size. The same command resumes after a stop, and draws nothing twice.
"""

import dataclasses
import time
from collections.abc import Sequence
from functools import partial

from config import SettingError
from runtime import command
from runtime.errors import Stopped


@dataclasses.dataclass(frozen=True)
class Generate:
    """Draw samples of a trained run."""

    run: str
    """Folder of the run, or one of its .pt files."""
    out: str
    """Folder for PNGs (in subfolders of 1000), or a file FILE.npz."""
    num: int = 64
    """Number of samples."""
    weights: str = 'ema'
    """ema (the run's first moving average), another by its name (ema_0.999), raw, or posthoc_0.1 (docs/numbers.md)."""
    labels: str = ''
    """Classes, used in turn, by name or number: Sneaker,Bag or 3,5 or '"a name, with a comma",0'; empty: all."""
    solver: str | None = None
    """Key of SOLVERS in solvers/table.py; default: the run's own (also for the next four flags)."""
    nfe: int | None = None
    """Network evaluations (NFE) per sample; 0: the run's num_sample_steps."""
    num_sample_steps: int | None = None
    """Solver steps per sample, instead of nfe."""
    time_grid: str | None = None
    """Key of TIME_GRIDS in solvers/table.py."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance; 1: no guidance."""
    seed: int = 0
    """Seed of the samples."""
    batch_size: int = 64
    """Samples that each process draws at once."""
    trajectory: bool = False
    """Also write path.png and path.gif: the paths of the first samples from noise to data."""
    training_gif: bool = False
    """Also write training.gif: the run's pictures of samples during training, which all start from the same noise."""
    data_path: str | None = None
    """New path of the data, if they were moved and samples start from data (set data_dir too if needed)."""
    data_dir: str | None = None
    """Folder of downloaded data and caches; default: the run's own."""
    trust: bool = False
    """Run the code that the run names, even if it is outside the project and the folder you are in."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and draw the samples."""
    options = command.options(Generate, argv, __doc__, 'run', 'out', 'data_path', 'data_dir')
    command.run(lambda: generate(options))


def generate(options: Generate) -> None:
    """Draw the samples that are missing, all processes together. Raises SettingError and Stopped."""
    from evaluation.detectors import digest_of
    from reports.plots import titles_of
    from runtime import ranks, stopping
    from scripts.outputs import SampleFiles, write_gif
    from scripts.samples import Samples

    o = options
    if o.num < 1 or o.batch_size < 1:
        raise SettingError(f'num={o.num}, batch_size={o.batch_size}: must be at least 1.')
    same = 'solver num_sample_steps time_grid guidance_scale data_path data_dir trust'
    settings = {name: getattr(o, name) for name in same.split()}
    samples = Samples(o.run, o.weights, o.num, o.seed, o.labels, sample_nfe=o.nfe, **settings)
    run, are_images = samples.run, samples.run.gallery.are_images
    made_by = dict(step=run.step, weights=o.weights, labels=o.labels, sample_seed=o.seed)
    layout = '' if run.overrides('decode') else run.data.layout
    made_by |= {'layout': layout} if layout else {}
    out = SampleFiles(
        o.out, are_images, vars(run.config) | made_by | dict(weights_digest=digest_of(run.network)), layout
    )
    if o.trajectory and run.gallery.kind is None:
        raise SettingError('trajectory=True: no entry of KINDS (reports/kinds.py) draws these samples. Leave it out.')
    in_training = samples.pictures_of_training() if o.training_gif else []

    ranks.on_main(out.claim)
    todo = sorted(set(range(o.num)) - ranks.on_main(out.existing))
    already = f', {o.num - len(todo)} of them already drawn' if len(todo) < o.num else ''
    which = f'{o.run} at step {run.step}, weights {o.weights}, solver {run.config.solver}'
    ranks.print_once(f'{which}: {o.num} samples to {o.out}{already}')
    stopping.catch_stop_signals()
    began = time.monotonic()
    try:
        for batch, x, inputs in samples.batches(todo, o.batch_size):
            out.add(batch, x, inputs.label, inputs.cond)
    except Stopped:
        ranks.print_once('stopped: the same command resumes, and draws nothing twice')
        raise
    speed = f', {len(todo) / (time.monotonic() - began):.1f} samples/s' if todo else ''
    shown = min(o.num, run.gallery.num_shown)
    label, classes = samples.label(o.batch_size), run.data.classes or tuple(map(str, range(run.data.num_classes)))
    titles = titles_of(run.data, None if label is None else label[:shown], run.config.label_dropout)
    draw = partial(run.gallery.draw_items, names=titles, across=run.data.columns()) if run.gallery.kind else None
    ranks.on_main(lambda: out.finish(shown, label, classes, draw))
    if o.trajectory:
        ranks.on_main_as_one_process(lambda: samples.show_path(out))
    if o.training_gif:
        ranks.on_main(lambda: write_gif(out.picture('training.gif'), in_training, 500))
    ranks.print_once(f'{o.num} samples in {o.out}{speed}')


if __name__ == '__main__':
    main()
