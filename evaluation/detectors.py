"""Feature extractors for comparing samples with data: Inception, DINOv2, a small classifier, raw pixels.

`JudgedData` holds the data that samples are compared with. distances.py compares the features.
"""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import utils
from config import SettingError, choose
from data_loading.loader import Loader
from runtime import alive, files, ranks

MOST_PIXELS = 1024  # the covariance of more features is slow to compute
CLASSIFIER_STEPS = 800  # a minute on two CPU cores for images of 28 x 28
MOST_SUPPORTING = 5000  # training images of a support-vector machine
Features = Callable[[Tensor], Tensor]  # decoded images (B, C, H, W) in [0, 1] -> (B, D) float32


@dataclass(frozen=True)
class JudgedData:
    """The data that samples are compared with, after `decode(encode(x))`."""

    train: Loader
    held_out: Loader
    as_decoded: Callable[[Tensor], Tensor]
    dataset: str  # name of the data set in messages
    cache: Path  # folder for features and classifiers
    device: torch.device

    @cached_property
    def example(self) -> Tensor:
        """At most 64 items, spread over the data, decoded."""
        with torch.no_grad():
            return self.as_decoded(self.train.take(range(0, self.train.size, -(-self.train.size // 64)))[0])

    def mismatch(self, x: Tensor) -> str:
        """Why decoded samples (n, ...) can't be compared with the data; empty if they can."""
        shape, own = tuple(x.shape[1:]), tuple(self.example.shape[1:])
        if shape != own:
            return f'samples have shape {shape}, items of {self.dataset} have {own}'
        return '' if (self.example != self.example[:1]).any() else f'all items of {self.dataset} are equal'

    @property
    def are_images_with_classes(self) -> bool:
        """Whether decoded data are images of the shape loaded, with two or more classes."""
        spec, x = self.train.spec, self.example
        return spec.scale == 'image' and x.ndim == 4 and x.shape[1:] == spec.shape and spec.num_classes > 1


@dataclass(frozen=True)
class Detector:
    """A feature extractor."""

    features: Features
    digest: str  # hash of the weights: numbers are comparable only for equal weights
    about: str  # a line for the reader
    predict: Callable[[Tensor], Tensor] | None = None  # images -> classes (B,), if it knows the classes of the data
    is_slow: bool = True  # then features of data are cached in a file
    name: str = ''  # key of DETECTORS


def pixels(data: JudgedData, weights: str) -> Detector:
    """Pixels in [-1, 1], averaged to 16 x 16 if there are more than MOST_PIXELS; for other data the values as they are.
    Small grey images with classes also have a support-vector machine as a classifier."""
    x = data.example
    if x.ndim != 4 or x.shape[1] not in (1, 3, 4) or x.min() < 0 or x.max() > 1:
        return Detector(lambda x: x.flatten(1).float(), 'values', 'the values as they are', is_slow=False)
    if x[0].numel() > MOST_PIXELS:
        small = nn.functional.adaptive_avg_pool2d
        about = 'pixels in [-1, 1], averaged to 16 x 16'
        return Detector(lambda x: 2 * small(x, 16).flatten(1) - 1, 'pixels 16', about, is_slow=False)
    predict, about = None, 'pixels in [-1, 1]'
    if is_grey_with_classes(data):
        x, label, *_ = data.train.take(range(min(MOST_SUPPORTING, data.train.size)))
        if label.unique().numel() > 1:
            predict, about = support_vectors(x, label), f'{about}, and a support-vector machine of the classes'
    return Detector(lambda x: 2 * x.flatten(1).float() - 1, 'pixels', about, predict, is_slow=False)


def is_grey_with_classes(data: JudgedData) -> bool:
    """Whether the data are images with one channel, few pixels, and two or more classes."""
    return data.are_images_with_classes and data.example.shape[1] == 1 and data.example[0].numel() <= MOST_PIXELS


def support_vectors(images: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """A support-vector machine on pixels: images (N, C, H, W) in [0, 1] -> classes (N,). `labels` must hold two or more
    classes."""
    from sklearn.svm import SVC  # a second to import

    flat = lambda x: (2 * x.detach().cpu().float().flatten(1) - 1).numpy()  # noqa: E731
    machine = SVC(gamma='scale').fit(flat(images), labels.cpu().numpy())
    return lambda x: torch.from_numpy(machine.predict(flat(x))).to(x.device)


def from_torch_fidelity(name: str, full_name: str, layer: str, data: JudgedData, weights: str) -> Detector:
    """A feature extractor of torch-fidelity (Obukhov et al. 2020), with weights from the file `weights` or downloaded.

    Grey images become three equal channels. Raises SettingError for data that are not images in [0, 1], and if the
    weights cannot be loaded.
    """
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    shape, low, high = tuple(data.example.shape[1:]), float(data.example.min()), float(data.example.max())
    if len(shape) != 3 or shape[0] not in (1, 3) or not utils.is_nearly_unit(data.example):
        needs = f'detector={name!r} needs images in [0, 1] of one or three channels'
        raise SettingError(f'{needs}; these are {shape}, in [{low:.3g}, {high:.3g}]. Use --detector pixels.')
    kind = FEATURE_EXTRACTORS_REGISTRY[full_name]
    path = str(Path(weights).expanduser()) if weights else None
    if path is not None and not Path(path).is_file():
        raise SettingError(f'detector_weights={weights!r}: there is no such file. Leave it out to download weights.')
    try:
        made: Any = ranks.rank_0_first(lambda: kind(full_name, [layer], feature_extractor_weights_path=path))
    except Exception as error:  # a damaged file, weights of another model, no internet connection, ...
        text = ' '.join(str(error).split())[:300]
        remedy = 'Pass their file as --detector_weights PATH, or use --detector classifier or pixels, which need none'
        what = f'detector={name!r}: its weights cannot be loaded ({type(error).__name__}: {text})'
        raise SettingError(f'{what}. {remedy}.') from None
    network = made.to(data.device)

    def features(x: Tensor) -> Tensor:
        x = (x.clamp(0, 1) * 255).round().byte().to(data.device)
        return network(x.expand(-1, 3, -1, -1))[0].float()

    return Detector(features, digest_of(network), f'torch-fidelity {full_name}, layer {layer}')


def classifier(data: JudgedData, weights: str) -> Detector:
    """A small network trained on the classes of the data themselves: 64 features before its last layer.

    It is trained once per data set, in a minute or two, and cached with its accuracy in data_dir/cache. Raises
    SettingError if the data have no classes.
    """
    spec = data.train.spec
    if spec.num_classes < 2 or not spec.shape or len(spec.shape) != 3:
        raise SettingError("detector='classifier' needs images with two or more classes. Use --detector pixels.")
    path = data.cache / f'classifier-{files.digest(data.train.fingerprint)}.pt'

    def make() -> dict[str, Any]:
        if (kept := read_cache(path)) is None:
            write_cache(path, kept := train_classifier(data))
        return kept

    found = ranks.on_main_patiently(make)
    network = Classifier(spec.shape[0], spec.num_classes).to(data.device).eval()
    network.load_state_dict(found['network'])
    about = f'classifier trained on the data, {found["accuracy"]:.1%} accuracy on held-out images'
    return Detector(network.features, digest_of(network), about, lambda x: network(x).argmax(1))


class Classifier(nn.Module):
    """Four convolutions, each followed by 2 x 2 pooling down to 4 x 4, and a linear layer on their spatial mean."""

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


def train_classifier(data: JudgedData) -> dict[str, Any]:
    """Train a Classifier: its weights, and its accuracy on the held-out images."""
    spec, loader, device = data.train.spec, data.train, data.device
    utils.seed_everything(0, 'classifier')
    network = Classifier(spec.shape[0] if spec.shape else 1, spec.num_classes).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    ranks.print_once(f'training a classifier on {data.dataset} to judge samples, once for this data set: a few minutes')
    began = time.monotonic()
    for step in alive.with_progress(range(CLASSIFIER_STEPS), 'training the classifier', CLASSIFIER_STEPS, 'step'):
        for group in optimizer.param_groups:
            group['lr'] = 3e-3 * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / CLASSIFIER_STEPS)) / 2
        x, label, *_ = loader.take(torch.randint(loader.size, (128,)))
        loss = nn.functional.cross_entropy(network(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    n = data.held_out.size
    batches = map(data.held_out.take, torch.arange(n).split(256))
    with torch.no_grad():
        accuracy = sum(int((network(x).argmax(1) == label).sum()) for x, label, *_ in batches) / n
    ranks.print_once(f'  {accuracy:.1%} accuracy on {n} held-out images after {time.monotonic() - began:.0f} s')
    return dict(network=network.cpu().state_dict(), accuracy=accuracy)


def read_cache(path: Path) -> dict[str, Any] | None:
    """The content that `write_cache` wrote, its tensors memory-mapped; None if the file is missing or damaged."""
    try:
        return torch.load(path, mmap=True, weights_only=True)
    except files.LOAD_ERRORS:
        return None


def write_cache(path: Path, content: dict[str, Any]) -> None:
    """Write a file atomically; on failure print why and go without a cache."""
    try:
        with files.atomic_write(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
        print(f'cannot write the cache {path}: {error}. The next run computes it again', flush=True)


def digest_of(network: nn.Module) -> str:
    """A hash of all weights."""
    return files.digest(*itertools.chain.from_iterable(network.state_dict().items()))


def get_detector(data: JudgedData, name: str = '', weights: str = '') -> Detector:
    """The detector `name` of DETECTORS; '': classifier for images with classes, except small grey ones, else pixels.
    `weights`: a file, or '' to download them. Raises SettingError."""
    if not name:
        name = 'classifier' if data.are_images_with_classes and not is_grey_with_classes(data) else 'pixels'
    return replace(choose('detector', name, DETECTORS)(data, weights), name=name)


def agreement(recognised: Tensor | None, detector: Detector, data: JudgedData) -> dict[str, float]:
    """Shares of `recognised` samples (n,) and of 1000 held-out items in which `detector` sees the class; or {}."""
    if recognised is None or detector.predict is None:
        return {}
    x, label, *_ = data.held_out.take(range(min(1000, data.held_out.size)))
    with torch.no_grad():
        seen = torch.cat([detector.predict(data.as_decoded(part).to(data.device)).cpu() for part in x.split(256)])
    both = dict(label_agreement=recognised, real_label_agreement=seen == label.cpu())
    return {name: float(right.double().mean()) for name, right in both.items()}


def rows_of(loader: Loader, most: int | None) -> Tensor:
    """Indices of all items, or of `most` random ones, the same every time."""
    rows = torch.arange(loader.size)
    if most is None or len(rows) <= most:
        return rows
    return torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most]


def features_of_data(detector: Detector, data: JudgedData, most: int | None = None) -> tuple[Tensor, Tensor]:
    """(features (N, D) of training images, features (K, D) of held-out ones), each of at most `most`, on every rank.
    The processes share the work. Features of a slow detector are cached in data_dir/cache."""

    def compute(loader: Loader, rows: Tensor) -> Tensor:
        my_batches = rows[ranks.my_items(len(rows))].split(256)
        batches = alive.with_progress(my_batches, 'computing features of the data', len(my_batches), 'batch')
        with torch.no_grad():
            parts = [detector.features(data.as_decoded(loader.take(part)[0])).cpu() for part in batches]
        return ranks.gather_items(torch.cat(parts), len(rows))

    def cached(loader: Loader, part: str) -> Tensor:
        rows = rows_of(loader, most)
        if not detector.is_slow:
            return compute(loader, rows)
        with torch.no_grad():
            first = data.as_decoded(loader.take(range(min(8, loader.size)))[0])
        values = (first.cpu().double() * 1000).round().flatten().tolist()  # they differ if the encoder does
        key = files.digest(f'{detector.digest} {loader.fingerprint} {part} {len(rows)} {values}')
        path = data.cache / f'features-{key}.pt'
        known = read_cache(path) or {}
        if ranks.any_rank('x' not in known):
            known = dict(x=compute(loader, rows))
            if ranks.is_first_of_machine():
                write_cache(path, known)
        return known['x']

    return cached(data.train, 'train'), cached(data.held_out, 'held out')


DETECTORS: dict[str, Callable[[JudgedData, str], Detector]] = {
    'inception': partial(from_torch_fidelity, 'inception', 'inception-v3-compat', '2048'),
    'dinov2': partial(from_torch_fidelity, 'dinov2', 'dinov2-vit-l-14', 'dinov2'),
    'classifier': classifier,
    'pixels': pixels,
}
