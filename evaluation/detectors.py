"""What looks at images in place of a person: networks whose features are compared between samples and data."""

import contextlib
import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import utils
from config import SettingError
from data_loading import packed
from data_loading.loader import Loader
from runtime import ranks

if TYPE_CHECKING:
    from trainer import BaseDiffusionTrainer

MOST_PIXELS = 1024  # features of which a covariance is quickly computed
CLASSIFIER_STEPS = 800  # a minute on two CPU cores for images of 28 x 28


@dataclass(frozen=True)
class Detector:
    """`features(x)` of decoded images (B, C, H, W) in [0, 1], (B, D) float32."""

    features: Callable[[Tensor], Tensor]
    digest: str  # of its weights: numbers of other weights are not comparable
    about: str
    predict: Callable[[Tensor], Tensor] | None = None  # images -> classes (B,), if it knows those of the data


def pixels(trainer: 'BaseDiffusionTrainer', weights: str) -> Detector:
    """The pixels themselves, in [-1, 1]; images of more than MOST_PIXELS values are averaged to 16 x 16 first. Of what
    is no image in [0, 1], the values as they are."""
    x = trainer.decode(trainer.example.x0)
    if x.ndim != 4 or x.shape[1] not in (1, 3, 4) or x.min() < 0 or x.max() > 1:
        return Detector(lambda x: x.flatten(1).float(), 'values', 'the values as they are')
    if x[0].numel() <= MOST_PIXELS:
        return Detector(lambda x: 2 * x.flatten(1) - 1, 'pixels', 'pixels in [-1, 1]')
    small = nn.functional.adaptive_avg_pool2d
    return Detector(lambda x: 2 * small(x, 16).flatten(1) - 1, 'pixels 16', 'pixels in [-1, 1], averaged to 16 x 16')


def from_torch_fidelity(name: str, layer: str, trainer: 'BaseDiffusionTrainer', weights: str) -> Detector:
    """A feature extractor of torch-fidelity (Obukhov et al. 2020), from the file `weights` or its own download.

    Grey images become three equal channels. Raises SettingError if the weights cannot be had.
    """
    import torch_fidelity.feature_extractor_dinov2 as dino
    import torch_fidelity.feature_extractor_inceptionv3 as inception

    kind = dict(inception=inception.FeatureExtractorInceptionV3, dinov2=dino.FeatureExtractorDinoV2)[name]
    names = dict(inception='inception-v3-compat', dinov2='dinov2-vit-l-14')
    path = str(Path(weights).expanduser()) if weights else None
    if path is not None and not Path(path).is_file():
        raise SettingError(f'detector_weights={weights!r}: there is no such file. Leave it out to have it downloaded.')
    try:
        network: Any = ranks.in_turns(lambda: kind(names[name], [layer], feature_extractor_weights_path=path))
    except Exception as error:  # no file, another network's, no network to download from
        text = ' '.join(str(error).split())[:300]
        raise SettingError(
            f'detector={name!r}: its weights cannot be had ({type(error).__name__}: {text}). Download them by hand '
            'and pass the file as --detector_weights PATH; or use --detector classifier or pixels, which need none.'
        ) from None
    network = network.to(trainer.device)
    channels = tuple(trainer.decode(trainer.example.x0[:1]).shape[1:2])
    if channels not in ((1,), (3,)):
        raise SettingError(f'detector={name!r} looks at images of one or three channels. Use --detector pixels.')

    def features(x: Tensor) -> Tensor:
        x = (x.clamp(0, 1) * 255).round().byte().to(trainer.device)
        return network(x.expand(-1, 3, -1, -1))[0].float()

    return Detector(features, digest_of(network), f'torch-fidelity {names[name]}, layer {layer}')


def classifier(trainer: 'BaseDiffusionTrainer', weights: str) -> Detector:
    """A small network that has learned the classes of the data themselves: 64 features before its last layer.

    It is trained once for a data set, in a minute or two, and kept with its accuracy in data_dir/cache. Raises
    SettingError if the data have no classes.
    """
    spec, config = trainer.data, trainer.config
    if spec.num_classes < 2 or not spec.shape or len(spec.shape) != 3:
        raise SettingError("detector='classifier' needs images of two or more classes. Use --detector pixels.")
    mark = hashlib.blake2b(trainer.train_loader.fingerprint.encode(), digest_size=8).hexdigest()
    path = Path(config.data_dir, 'cache', f'classifier-{mark}.pt')
    kept = ranks.on_main(lambda: classifier_in(path))
    if kept is None:
        kept = ranks.on_each(lambda: train_classifier(trainer) if ranks.is_main() else None, patient=True)
        ranks.on_main(lambda: keep(lambda unfinished: torch.save(kept, unfinished), path))
    found = ranks.on_main(lambda: kept)
    assert found is not None
    network = Classifier(spec.shape[0], spec.num_classes).to(trainer.device).eval()
    network.load_state_dict(found['network'])
    about = f'classifier of the data, {found["accuracy"]:.1%} of held-out images right'
    return Detector(network.features, digest_of(network), about, lambda x: network(x).argmax(1))


class Classifier(nn.Module):
    """Four convolutions, each of half the size of the one before, and a linear layer on their mean."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        widths = (channels, 32, 64, 64, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU())
            for a, b in itertools.pairwise(widths)
        )
        self.last = nn.Linear(widths[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = 2 * x - 1
        for block in self.blocks:
            x = block(x)
            if min(x.shape[2:]) > 4:
                x = nn.functional.avg_pool2d(x, 2)
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


def train_classifier(trainer: 'BaseDiffusionTrainer') -> dict[str, Any]:
    """Weights, and accuracy on the held-out images."""
    spec, loader, device = trainer.data, trainer.train_loader, trainer.device
    utils.seed_everything(0, 'classifier')
    network = Classifier(spec.shape[0] if spec.shape else 1, spec.num_classes).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    ranks.print_once(
        f'training a classifier of {trainer.config.dataset} to judge samples by, once for this data set: a few minutes'
    )
    began = time.monotonic()
    for step in range(CLASSIFIER_STEPS):
        for group in optimizer.param_groups:
            group['lr'] = 3e-3 * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / CLASSIFIER_STEPS)) / 2
        x, label, *_ = loader.take(torch.randint(loader.size, (128,)))
        loss = nn.functional.cross_entropy(network(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    test, right = trainer.test_loader, 0
    with torch.no_grad():
        for rows in torch.arange(test.size).split(256):
            x, label, *_ = test.take(rows)
            right += int((network(x).argmax(1) == label).sum())
    accuracy = right / test.size
    ranks.print_once(f'  {accuracy:.1%} of {test.size} held-out images right after {time.monotonic() - began:.0f} s')
    return dict(network=network.cpu().state_dict(), accuracy=accuracy)


def classifier_in(path: Path) -> dict[str, Any] | None:
    """What `train_classifier` once found out about these data; None if that is not there, or damaged."""
    try:
        return torch.load(path, weights_only=True)
    except Exception:
        return None


def keep(write: Callable[[Path], object], path: Path) -> None:
    """Let `write` write a file that becomes `path` when it is whole. What cannot be kept is said, and made anew."""
    unfinished = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:
        print(f'{path} cannot be kept for the next time: {error}', flush=True)
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def digest_of(network: nn.Module) -> str:
    """A hash of all weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def usual(trainer: 'BaseDiffusionTrainer') -> str:
    """The detector for samples that nobody asked another for: classifier where the data are images of classes and are
    decoded as such, else pixels."""
    data, shape = trainer.data, tuple(trainer.decode(trainer.example.x0[:1]).shape[1:])
    images = data.scale == 'image' and len(shape) == 3 and shape == data.shape
    return 'classifier' if images and data.num_classes > 1 else 'pixels'


def features_of_data(
    trainer: 'BaseDiffusionTrainer', detector: Detector, most: int | None = None
) -> tuple[Tensor, Tensor]:
    """Features of the training images, or of `most` of them, and of the held-out ones, as they are decoded, on every
    rank; the processes share the work. They are kept in data_dir/cache."""

    def features(loader: Loader, rows: Tensor) -> Tensor:
        parts = []
        with torch.no_grad():
            for mine in rows[ranks.my_items(len(rows))].split(256):
                x, *_ = loader.take(mine)
                parts.append(detector.features(trainer.decode(trainer.encode(x))).cpu())
        return ranks.gather_items(torch.cat(parts), len(rows))

    def kept(loader: Loader, part: str) -> Tensor:
        rows = torch.arange(loader.size)
        if most is not None and len(rows) > most:
            rows = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most]
        with torch.no_grad():
            first = trainer.decode(trainer.encode(loader.take(range(min(8, loader.size)))[0]))
        values = (first.double().cpu() * 1000).round().flatten().tolist()  # of another encoder they are others
        mark = f'{detector.digest} {loader.fingerprint} {part} {len(rows)} {values}'
        name = hashlib.blake2b(mark.encode(), digest_size=8).hexdigest()
        path = Path(trainer.config.data_dir, 'cache', f'features-{name}.pt')
        known = packed.cached(path)
        if not ranks.any_rank(known is None):
            assert known is not None
            return known['x']
        found = features(loader, rows)
        if ranks.is_first_of_machine():
            keep(lambda unfinished: packed.write(unfinished, found, torch.zeros(len(found), dtype=torch.int64)), path)
        return found

    return kept(trainer.train_loader, 'train'), kept(trainer.test_loader, 'held out')


DETECTORS: dict[str, Callable[['BaseDiffusionTrainer', str], Detector]] = {
    'inception': lambda trainer, weights: from_torch_fidelity('inception', '2048', trainer, weights),
    'dinov2': lambda trainer, weights: from_torch_fidelity('dinov2', 'dinov2', trainer, weights),
    'classifier': classifier,
    'pixels': pixels,
}
