"""The arrays in a file, by name. arrays.py decides which of them are the data.

.npz is read whole, .npy is mapped into memory, and an array of numbers in .zarr, .h5 or .nc is a `Stored`, which reads
the rows that are needed.
"""

import os
import zipfile
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import DataError, SettingError

# ending -> the package that reads it, which is imported when there is such a file
PACKAGES = {'.zarr': 'zarr', '.h5': 'h5py', '.hdf5': 'h5py', '.nc': 'netCDF4'}
OPEN: dict[str, Callable[[Any, str], Any]] = {  # package -> function of (package, path) that opens a file to read
    'zarr': lambda zarr, path: zarr.open(path, mode='r'),
    'h5py': lambda h5py, path: h5py.File(path, 'r'),
    'netCDF4': lambda netcdf, path: netcdf.Dataset(path),
}
ENDINGS = '.npy', '.npz', *PACKAGES, '.pt'
AXIS = ' (axis)'  # ends the name of an array of coordinates, such as x along the columns of fields, which is not data
BLOCK = 2**26  # bytes that are read at once to find the least and the largest value

opened: dict[tuple[Path, str], Any] = {}  # files that this process has open, and arrays in them, by name


def close() -> None:
    """Close all files. They are opened again when something reads them."""
    for (_, name), file in opened.items():
        if not name and hasattr(file, 'close'):  # a zarr needs no closing
            file.close()
    opened.clear()


os.register_at_fork(before=close)  # a forked loader process would share its place in an open file with this process


def open_at(path: Path, name: str = '') -> Any:
    """The array of this name, or the whole file. Raises ImportError without its package, else errors of the package."""
    if (path, name) not in opened:
        package = PACKAGES[path.suffix]
        found = open_at(path)[name] if name else OPEN[package](import_module(package), str(path))
        opened[path, name] = found
    return opened[path, name]


class Stored:
    """An array (N, ...) of numbers in a file. A slice reads these rows; each process opens the file for itself.

    Has the attributes of a numpy array that arrays.py needs. Raises DataError if rows cannot be read.
    """

    def __init__(self, path: Path, name: str, array: Any):
        self.path, self.name, self.shape, self.ndim = path, name, tuple(array.shape), len(array.shape)
        found = array[:0] if array.shape else array  # netCDF4 scales what it reads, which may change the type
        self.dtype = np.dtype(found.dtype).newbyteorder('=')
        self.nbytes = self.dtype.itemsize * int(np.prod(self.shape, dtype=object))
        chunks = array.chunking() if hasattr(array, 'chunking') else array.chunks  # netCDF4 has a method
        self.chunk = chunks[0] if isinstance(chunks, list | tuple) and chunks else 1  # rows that are stored together
        self.packed = sorted({'scale_factor', 'add_offset'} & set(getattr(array, 'attrs', ())))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        where = f'{self.name or "the array"} of {self.path.name}'
        if self.packed:
            raise DataError(f'{where} has {" and ".join(self.packed)}. Store the numbers that it stands for.')
        try:
            found = open_at(self.path, self.name)[rows]
        except Exception as error:  # the packages have many kinds
            raise DataError(f'{where} cannot be read ({cause_of(error)}). Copy the file again.') from None
        if isinstance(found, np.ma.MaskedArray):  # netCDF4 masks missing values
            if found.dtype.kind != 'f' and np.ma.is_masked(found):
                raise DataError(f'{where} has missing values. Fill them in, or leave these items out.')
            found = found.filled(np.nan) if found.dtype.kind == 'f' else found.data
        return np.asarray(found, self.dtype)

    @cached_property
    def extremes(self) -> tuple[Any, Any]:
        """(the least value, the largest value), read in blocks of rows."""
        step = max(1, BLOCK * len(self) // max(1, self.nbytes))
        blocks = (self[i : i + step] for i in range(0, len(self), step))
        lows, highs = zip(*((block.min(), block.max()) for block in blocks), strict=True)
        return min(lows), max(highs)

    def min(self) -> Any:
        return self.extremes[0]

    def max(self) -> Any:
        return self.extremes[1]


def cause_of(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())}'


# ---------------------------------------------------------------- the arrays of a file


def arrays_in(path: Path, where: str) -> dict[str, Any]:
    """The arrays in a file, by name; an array in a group is called group/name, and coordinates get AXIS after their
    name. Raises SettingError."""
    if path.suffix not in PACKAGES:
        return read_numpy(path, where)
    package = PACKAGES[path.suffix]
    close()  # the file may have changed
    try:
        file = open_at(path)
        if package == 'zarr' and hasattr(file, 'shape'):  # not a group, but one array
            return {'x': Stored(path, '', file)}
        found = {}
        for name, x in walk(file):
            text = read_text(x)
            found[name + AXIS * is_axis(name, x)] = Stored(path, name, x) if text is None else text
        return found
    except ImportError as error:
        raise SettingError(f'{where}: this needs the {package} package: pip install {package} ({error}).') from None
    except Exception as error:  # the packages have many kinds
        raise SettingError(f'{where} cannot be read by {package} ({cause_of(error)}). Copy it again.') from None


def walk(group: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """(name, array) of all arrays in a group and the groups in it, in the order of their names."""
    children = {**group.variables, **group.groups} if hasattr(group, 'variables') else group  # netCDF4, or a mapping
    for name in sorted(children):
        child = children[name]
        if getattr(child, 'shape', None) is not None:  # None in HDF5: it holds nothing
            yield f'{prefix}{name}', child
        elif hasattr(child, 'keys') or hasattr(child, 'variables'):
            yield from walk(child, f'{prefix}{name}/')


def is_axis(name: str, array: Any) -> bool:
    """True for an array of coordinates: netCDF and xarray give it the name of its only axis."""
    axes = getattr(array, 'dimensions', None) or getattr(getattr(array, 'metadata', None), 'dimension_names', None)
    return [*(axes or getattr(array, 'attrs', {}).get('_ARRAY_DIMENSIONS', ()))] == [name.rpartition('/')[2]]


def read_text(array: Any) -> np.ndarray | None:
    """Strings as numpy's own; None for anything else."""
    if np.dtype(array.dtype).kind not in 'OSTU':
        return None
    found = np.asarray(array[...])
    values = [value.decode() if isinstance(value, bytes) else value for value in found.ravel().tolist()]
    return np.array(values, str).reshape(found.shape) if all(isinstance(value, str) for value in values) else found


def read_numpy(path: Path, where: str) -> dict[str, np.ndarray]:
    """The arrays in a file of numpy, by name; memory-mapped if there is only one. Raises SettingError."""
    try:
        with path.open('rb') as file:
            begins = file.read(6)
        if not begins.startswith((b'\x93NUMPY', b'PK')):
            raise ValueError(f'it is not a numpy file: it begins with {begins}')
        found = np.load(path, mmap_mode='c', allow_pickle=False)  # 'r' maps the file shared, which some disks refuse
        arrays = {'x': found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
        return {name: x if x.dtype.isnative else x.astype(x.dtype.newbyteorder('=')) for name, x in arrays.items()}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        remedy = 'Copy it again.' if 'file size' in str(error) else 'Write plain numbers by np.save or np.savez.'
        remedy += ' np.stack(images) and labels.astype(str) convert Python objects.' * ('bject' in str(error))
        raise SettingError(f'{where} cannot be read ({error}). {remedy}') from None
