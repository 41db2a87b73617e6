"""Orders the data, deals them to the processes, and yields batches on the device.

The order of the training data is an endless stream of permutations, each a function of (seed, epoch); step s reads
positions [s B, (s + 1) B). A step's global batch is cut into `batch_shards` shards, and each process reads its share of
them, so the images of a step do not depend on the number of processes.
"""

import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from config import Config
from data_loading import workers
from data_loading.checks import collate
from data_loading.spec import Arrays, Batch, DataSpec, Part
from runtime import ranks
from runtime.errors import DataError, SettingError, Stopped
from runtime.ranks import cores_per_process
from runtime.stopping import ignore_signals_except_from_parent


class ShardSampler(Sampler):
    """Deals the `batch_shards` equal shards of a global batch: each process gets a block of consecutive shards."""

    def __init__(self, num_images: int, config: Config):
        self.num_images, self.config = num_images, config
        self.num_shards, self.shard_size = config.batch_shards, config.global_batch_size // config.batch_shards
        self.all_shards = False  # True: this process reads the shards of all processes, in order

    @property
    def my_shards(self) -> range:
        n = self.num_shards // ranks.world_size()
        return range(ranks.rank() * n, (ranks.rank() + 1) * n)

    @property
    def shards_read(self) -> range:
        """The shards that iteration yields."""
        return range(self.num_shards) if self.all_shards else self.my_shards


class StreamSampler(ShardSampler):
    """Endless lists of image indices, one list per shard that this process reads, from the step of `set_step` on."""

    step = 0

    def set_step(self, step: int) -> None:
        """Start the next iteration at this step."""
        self.step = step

    def permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.config.seed, epoch)).permutation(self.num_images)

    def __iter__(self) -> Iterator[list[int]]:
        permutation = functools.lru_cache(maxsize=1)(self.permutation)
        batch = self.config.global_batch_size
        for step in itertools.count(self.step):
            first = 0 if self.config.overfit else step * batch
            epochs, places = np.divmod(np.arange(first, first + batch), self.num_images)
            # a batch may reach into the next epoch, or over several epochs of a small data set
            parts = [permutation(epoch)[places[epochs == epoch]] for epoch in range(epochs[0], epochs[-1] + 1)]
            yield from np.concatenate(parts).reshape(-1, self.shard_size)[list(self.shards_read)].tolist()


class HeldOutSampler(ShardSampler):
    """The indices of held-out images, in pieces the size of a shard; `batch_shards` pieces make a round, dealt like the
    shards of a step. In the last round some processes may have fewer pieces, or none."""

    @property
    def rounds(self) -> int:
        return -(-self.num_images // (self.num_shards * self.shard_size))

    def first_index(self, number: int) -> int:
        return number * self.shard_size

    def numbers(self, round: int) -> list[int]:
        """The pieces that this process reads in a round."""
        numbers = (round * self.num_shards + shard for shard in self.shards_read)
        return [number for number in numbers if self.first_index(number) < self.num_images]

    def __iter__(self) -> Iterator[list[int]]:
        for number in itertools.chain.from_iterable(map(self.numbers, range(self.rounds))):
            yield list(range(self.first_index(number), min(self.first_index(number + 1), self.num_images)))


def fits(arrays: Arrays, device: torch.device) -> bool:
    """Whether data may live on the device: on a GPU, if they take less than a quarter of the free memory. On the CPU
    they stay where they are; the system keeps as much of a memory-mapped file in memory as it can."""
    if device.type != 'cuda' or not torch.cuda.is_available():
        return True
    return sum(array.nbytes for array in arrays) < torch.cuda.mem_get_info(device)[0] / 4


class Numbered(Dataset):
    """Adds the numbers of items to a Dataset, for errors: rows of its file if it knows them, else indices."""

    def __init__(self, items: Any):
        self.items = items

    def __getitems__(self, indices: list[int]) -> tuple[list[int], list]:
        read, rows = getattr(self.items, '__getitems__', None), getattr(self.items, 'file_rows', None)
        numbers = indices if rows is None else [int(rows[i]) for i in indices]
        return numbers, read(indices) if read else [
            self.item(i, number) for i, number in zip(indices, numbers, strict=True)
        ]

    def item(self, i: int, number: int) -> Any:
        try:
            return self.items[i]
        except Exception as error:
            if not isinstance(error, (DataError, Stopped)):  # these name the item themselves
                print(f'item {number} of the data: {type(error).__name__}: {error}', file=sys.stderr, flush=True)
            raise


def collate_numbered(numbered: Any, spec: DataSpec, where: str) -> Arrays:
    return collate(numbered[1], spec, where, numbered[0])


class Loader:
    """Batches of one part of the data, on the device and scaled: each is a `Batch`.

    Iterating follows `batch_sampler`: the training data without end, the held-out data once. `take` reads any of the
    `size` items. A part made of arrays lives on the device if it fits. A part that is a Dataset, or does not fit, is
    read ahead by `num_workers` loader processes, at most one per core, into pinned memory. `labels` has the classes, on
    the CPU, if the data have classes and the part knows them.
    """

    facts: Mapping[str, Any] = {}  # LazyLoader only: facts about the data, from the checkpoint

    def __init__(
        self, part: Part, batch_sampler: Iterable[list[int]], spec: DataSpec, device: torch.device, num_workers: int
    ):
        self.batch_sampler, self.spec, self.device = batch_sampler, spec, device
        self.fingerprint = ''  # hash of the training and held-out data
        self.about = ''  # a line about both parts, for the report
        self.waited = 0.0  # seconds that iteration has waited for data
        self.size, self.has_pairs = len(part), part.has_pairs  # has_pairs: batches are (x, label, x1)
        self.rounds = getattr(batch_sampler, 'rounds', 0)  # see HeldOutSampler
        self.labels = part.classes(spec)  # (N,) int64, or None
        # `load` is left out: it may be a lambda, which cannot be sent to spawned processes
        self.collate = functools.partial(collate_numbered, spec=replace(spec, load=None), where=part.name)
        self.part, self.resident, self.workers = part, None, None
        if part.arrays is not None and fits(part.arrays, device):
            self.resident = tuple(array.to(device) for array in part.arrays)
            self.part = Part(self.resident, part.name, part.conditions)  # frees the arrays on the CPU
        else:
            number = min(num_workers, cores_per_process())  # torch warns above this
            self.workers = DataLoader(
                Numbered(part.items),
                batch_sampler=batch_sampler,
                collate_fn=self.collate,
                num_workers=number,
                pin_memory=device.type == 'cuda',
                persistent_workers=number > 0,
                worker_init_fn=ignore_signals_except_from_parent,
                multiprocessing_context=workers.START_METHOD if number else None,
            )

    def __iter__(self) -> Iterator[Batch]:
        if self.workers is None:
            batches = self._from_resident()
        else:
            read = workers.read(self.workers, self.part.name)
            moved = (tuple(array.to(self.device, non_blocking=True) for array in arrays) for arrays in read)
            batches = itertools.starmap(self._scaled, moved)
        while True:
            began = time.monotonic()
            arrays = next(batches, None)
            self.waited += time.monotonic() - began
            if arrays is None:
                return
            yield Batch(arrays, self.spec.conditions)

    def take(self, indices: Sequence[int] | Tensor) -> Batch:
        """The items with these indices as a batch on the device, read by this process itself."""
        if self.resident is not None:
            chosen = self._to_device(torch.as_tensor(indices))
            return self._batch(array[chosen] for array in self.resident)
        items = self.collate(Numbered(self.part.items).__getitems__([int(i) for i in indices]))
        return self._batch(array.to(self.device) for array in items)

    def everything(self) -> Batch:
        """All items as a batch, like `take` but on the CPU; only for a part made of arrays."""
        assert self.resident is not None, 'a Dataset may not fit into memory'
        return self._batch(array.cpu() for array in self.resident)

    def start_workers(self) -> None:
        """Fork the loader processes now, while no thread runs."""
        if self.workers is not None and self.workers.persistent_workers:
            workers.started(self.workers)

    def close(self) -> None:
        """End the loader processes, if there are any."""
        running: Any = getattr(self.workers, '_iterator', None)
        if self.workers is not None and running is not None:
            self.workers._iterator = None  # the next iteration starts new processes
            if getattr(running, '_worker_pids_set', False):
                # torch would raise for a process that SIGTERM kills because it has only just started
                torch._C._remove_worker_pids(id(running))
                running._worker_pids_set = False
            for process in getattr(running, '_workers', ()):  # they may be stuck in the user's Dataset
                process.terminate()
            running._shutdown_workers()

    def __del__(self) -> None:  # torch waits 5 s for each process of a loader that was not closed
        if 'workers' in vars(self) and not sys.is_finalizing():
            self.close()

    def open(self) -> None:
        """Load the data now, if they are not loaded yet: see LazyLoader."""

    def _scaled(self, x: Tensor, label: Tensor, *others: Tensor) -> Arrays:
        x, *x1 = map(self.spec.scaled, (x, *others[: self.has_pairs]))
        return x, label, *x1, *(value.float() for value in others[self.has_pairs :])

    def _batch(self, arrays: Iterable[Tensor]) -> Batch:
        return Batch(self._scaled(*arrays), self.spec.conditions)

    def _to_device(self, indices: Tensor) -> Tensor:
        if self.device.type == 'cuda' and not indices.is_cuda:  # a copy from unpinned memory is a CPU-GPU sync
            return indices.pin_memory().to(self.device, non_blocking=True)
        return indices.to(self.device)

    def _from_resident(self) -> Iterator[Arrays]:
        """Gathers and scales all shards of a step at once, which costs no more than one shard."""
        assert self.resident is not None
        shards = iter(self.batch_sampler)
        at_once = len(getattr(self.batch_sampler, 'shards_read', [0]))
        while step := list(itertools.islice(shards, at_once)):
            chosen = self._to_device(torch.tensor(list(itertools.chain.from_iterable(step))))
            arrays = self._scaled(*(array[chosen] for array in self.resident))
            yield from zip(*(array.split([len(indices) for indices in step]) for array in arrays), strict=True)


def facts_of(loader: Loader, **more: bool) -> dict[str, Any]:
    """The facts that a LazyLoader needs, as plain types for a checkpoint; {} if the spec is a subclass of DataSpec."""
    if type(loader.spec) is not DataSpec:
        return {}
    spec = {name: value for name, value in vars(loader.spec).items() if name != 'load'}
    plain = json.dumps(spec, default=lambda value: value.tolist())  # numpy numbers
    return dict(spec=json.loads(plain), has_pairs=loader.has_pairs, **more)


class LazyLoader(Loader):
    """A Loader for a run that is opened without training. `facts`, the spec and the fingerprint come from the
    checkpoint. Reading any other attribute loads the data themselves, by `load()`."""

    def __init__(self, checkpoint: Mapping[str, Any], load: Callable[[], Loader]):
        self.facts = dict(checkpoint['facts'], shape=checkpoint['shape'], cond=checkpoint['cond'])
        self.load, self.waited = load, 0.0
        saved: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in self.facts['spec'].items()}
        self.spec = DataSpec(load=lambda config: (), **saved)
        self.has_pairs, self.fingerprint = self.facts['has_pairs'], checkpoint['data']

    def __getattr__(self, name: str) -> Any:
        if 'size' in vars(self) or name.startswith('__'):  # the data are loaded, or Python looks for a special method
            raise AttributeError(name)
        self.open()
        return getattr(self, name)

    def open(self) -> None:
        """Load the data now. Raises SettingError if they are missing, or have another shape or number of classes."""
        if 'size' in vars(self):
            return
        try:
            loader = self.load()
        except SettingError as error:
            text = 'this needs the data of the run (for inputs that are data, for numbers, or a hook that reads data)'
            raise SettingError(f'{text}: {error}') from None
        specs = (self.spec, loader.spec)
        conditions = (f', conditions: {spec.named_conditions}' if spec.conditions else '' for spec in specs)
        was, now = (f'{spec.shape}, {spec.num_classes} classes{c}' for spec, c in zip(specs, conditions, strict=True))
        if was != now:
            raise SettingError(f'the run was trained on data of shape {was}, not {now}. Pass its data as --data_path.')
        if loader.fingerprint != self.fingerprint:
            other = f'other data ({self.fingerprint}) than those found now ({loader.fingerprint})'
            ranks.print_once(f'warning: the run was trained on {other}: check dataset, data_path and data_dir')
        vars(self).update(vars(loader))
