"""Writes the same arrays in each format of data_loading.stores."""

from pathlib import Path

import h5py
import netCDF4
import numpy as np
import zarr

FORMATS = '.npz', '.zarr', '.h5', '.nc'


def write(path: Path, arrays: dict[str, np.ndarray], **chunks: tuple) -> Path:
    """`path`, written by the package for its ending; a name may be group/name. `chunks`: name -> rows in a chunk."""
    if path.suffix == '.npz':
        np.savez(path, **arrays)
    elif path.suffix == '.zarr':
        root = zarr.open_group(str(path), mode='w')
        create = root.create_array if hasattr(root, 'create_array') else root.create_dataset  # zarr 3, 2
        for name, x in arrays.items():
            more = {'chunks': chunks[name]} if name in chunks else {}
            create(name, shape=x.shape, dtype=str if x.dtype.kind == 'U' else x.dtype, **more)[...] = x
    elif path.suffix == '.h5':
        with h5py.File(path, 'w') as file:
            for name, x in arrays.items():
                text = x.dtype.kind == 'U'
                file.create_dataset(name, data=x.astype(object) if text else x, chunks=chunks.get(name))
    else:
        with netCDF4.Dataset(path, 'w') as file:
            for name, x in arrays.items():
                x = x.astype('i1') if x.dtype == bool else x  # netCDF has no bools
                *group, last = name.split('/')
                place = file.createGroup(group[0]) if group else file
                for i, n in enumerate(x.shape):
                    place.createDimension(f'{last}_{i}', n)
                text = x.dtype.kind == 'U'
                axes = [f'{last}_{i}' for i in range(x.ndim)]
                variable = place.createVariable(last, str if text else x.dtype, axes, chunksizes=chunks.get(name))
                variable[...] = x.astype(object) if text else x
    return path
