"""Files of zarr, HDF5 and netCDF: the same data as in .npz, read by rows in processes, errors that name the file."""

import os
import sys

import h5py
import netCDF4
import numpy as np
import pytest
import torch
import zarr

from config import SettingError
from data_loading import arrays, stores
from data_utils import setup_data_train_and_test
from main import load_run
from runtime.errors import DataError
from tests.data_loading.stored import FORMATS, write
from tests.helpers import assert_same, assert_same_runs, losses, start_run_sh
from trainer import ExampleDiffusionTrainer
from training import run_record

CPU = torch.device('cpu')
RNG = np.random.default_rng(0)
DATA = dict(
    x=RNG.normal(size=(40, 1, 8, 8)).astype(np.float32) / 2,
    label=np.array(['owl', 'cat'] * 20),
    cond_wind=RNG.normal(size=(40, 2)),
    cond_hot=np.arange(40) % 2 == 0,
    x1=RNG.normal(size=(40, 1, 8, 8)),
)


@pytest.fixture
def load(tiny_config):
    def make(path, **settings):
        settings = dict(network='mlp', num_workers=0) | settings
        return setup_data_train_and_test(tiny_config(dataset='arrays', data_path=str(path), **settings), CPU)

    return make


def assert_same_batches(one, other):
    for a, b in zip([*one, *one.cond.values()], [*other, *other.cond.values()], strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_all_formats_hold_the_same_data(load, tmp_path, capsys):
    found = [load(write(tmp_path / f'x{ending}', DATA)) for ending in FORMATS]
    assert capsys.readouterr().out.count('conditions: hot (), wind (2,)\n') == len(FORMATS)
    assert found[0][0].spec.classes == ('cat', 'owl') and found[0][0].has_pairs
    for train, _, test in found:
        assert train.fingerprint == found[0][0].fingerprint and (train.size, test.size) == (36, 4)
        assert_same_batches(train.everything(), found[0][0].everything())
        assert_same_batches(test.take([2, 0]), found[0][2].take([2, 0]))
    x, label, x1 = found[0][0].everything()
    row = np.abs(DATA['x'] - x[7].numpy()).max((1, 2, 3)).argmin()
    cond = found[0][0].everything().cond
    assert cond['wind'][7].tolist() == pytest.approx(DATA['cond_wind'][row].tolist())
    assert cond['hot'].dtype == torch.float32 and cond['hot'][7] == DATA['cond_hot'][row]
    assert label[7] == (DATA['label'][row] == 'owl') and np.allclose(x1[7], DATA['x1'][row])


@pytest.mark.parametrize('ending', FORMATS)
@pytest.mark.parametrize('workers', [0, 2])
def test_rows_are_read_in_place_by_each_process(load, tmp_path, monkeypatch, capsys, ending, workers):
    path = write(tmp_path / f'x{ending}', DATA)
    whole, sampler, _ = load(path)
    sampler.set_step(3)
    batches = iter(whole)
    wanted = [next(batches) for _ in range(16)]
    monkeypatch.setattr(arrays, 'LARGEST_SHUFFLED', 100)
    train, sampler, test = load(path, num_workers=workers)
    assert train.resident is None
    assert isinstance(train.part.items.columns[0].array, stores.Stored) == (ending != '.npz')
    assert 'read row by row, in random order' in capsys.readouterr().out
    train.take([0])  # the file is open in this process when the others start
    sampler.set_step(3)
    rows = iter(train)
    for batch in wanted:
        assert_same_batches(next(rows), batch)
    train.close()
    test.close()
    assert train.fingerprint == load(path)[0].fingerprint != whole.fingerprint


def test_a_fork_closes_the_files_first(tmp_path):
    path = write(tmp_path / 'x.h5', DATA)
    stores.open_at(path, 'x')
    child = os.fork()
    if not child:
        os._exit(len(stores.opened))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and not stores.opened


@pytest.mark.parametrize('ending', FORMATS)
def test_groups_are_parts_of_names(load, tmp_path, monkeypatch, ending):
    two = {f'{split}/{name}': x[rows] for split, rows in (('train', slice(30)), ('test', slice(30, 40)))
           for name, x in DATA.items()}  # fmt: skip
    path = write(tmp_path / f'x{ending}', two)
    train, _, test = load(path)
    assert (train.size, test.size) == (30, 10) and train.spec.conditions == ('hot', 'wind')
    assert np.array_equal(test.everything()[0], DATA['x'][30:])
    if ending != '.npz':  # which is in memory anyway
        monkeypatch.setattr(arrays, 'LARGEST_SHUFFLED', 100)
        train, _, rows = load(path)
        assert rows.resident is None
        assert_same_batches(rows.take(range(10)), test.take(range(10)))
        assert np.allclose(train.take([3]).cond['wind'], DATA['cond_wind'][3])


@pytest.mark.parametrize('ending', FORMATS)
def test_whole_numbers_and_layouts_are_read_as_in_npz(load, tmp_path, monkeypatch, ending):
    x = RNG.integers(-9, 2000, (40, 8, 6, 3))
    given = dict(
        x=x, x1=x[::-1], cond_low=RNG.integers(0, 3, (40, 4, 3, 1)).astype('u1'), cond_n=np.arange(40)[:, None]
    )
    path = write(tmp_path / f'x{ending}', given)
    monkeypatch.setattr(stores, 'BLOCK', 3000)  # several blocks
    whole = load(path, value_range=(-10.0, 2000.0), network='unet')[0]
    monkeypatch.setattr(arrays, 'LARGEST_SHUFFLED', 100)
    train, _, _ = load(path, value_range=(-10.0, 2000.0), network='unet')
    assert_same_batches(train.take(range(36)), whole.everything())
    batch = whole.everything()
    n = int(batch.cond['n'][5, 0])
    assert np.allclose(batch[0][5], (np.moveaxis(x[n], -1, 0) + 10) / 2010, atol=1e-6)
    assert np.allclose(batch[2][5], (np.moveaxis(x[39 - n], -1, 0) + 10) / 2010, atol=1e-6)
    assert np.array_equal(batch.cond['low'][5], np.moveaxis(given['cond_low'][n], -1, 0))
    with pytest.raises(SettingError, match='and row 7 is outside'):
        given['x'][7, 2, 2] = 3000
        load(write(tmp_path / f'y{ending}', given), value_range=(-10.0, 2000.0), network='unet')


def test_a_zarr_may_be_one_array(load, tmp_path):
    zarr.save_array(str(tmp_path / 'x.zarr'), DATA['x'])
    np.save(tmp_path / 'x.npy', DATA['x'])
    assert load(tmp_path / 'x.zarr')[0].fingerprint == load(tmp_path / 'x.npy')[0].fingerprint


@pytest.mark.parametrize('kind', ['.nc', '.zarr 2', '.zarr 3'])
def test_coordinates_are_not_data(load, tmp_path, capsys, kind):
    """A grid of netCDF or xarray has arrays n(n), y(y) and x(x) besides the data."""
    path, axes = tmp_path / f'g{kind.split()[0]}', {'n': 40, 'y': 8, 'x': 6}
    given = {name: (np.arange(float(size)), (name,)) for name, size in axes.items()}
    given['data'] = np.ones((40, 8, 6), np.float32), tuple(axes)
    if kind == '.nc':
        with netCDF4.Dataset(path, 'w') as file:
            for name, size in axes.items():
                file.createDimension(name, size)
            for name, (x, dims) in given.items():
                file.createVariable(name, x.dtype, dims)[...] = x
    else:
        if (is_3 := zarr.__version__[0] != '2') < (kind == '.zarr 3'):
            pytest.skip('zarr 2 writes no names of axes')
        root = zarr.open_group(str(path), mode='w', **({'zarr_format': int(kind[-1])} if is_3 else {}))
        for name, (x, dims) in given.items():
            create, named = (root.create_array if is_3 else root.create_dataset), kind == '.zarr 3'
            array = create(name, shape=x.shape, dtype=x.dtype, **({'dimension_names': dims} if named else {}))
            array[...] = x
            if not named:
                array.attrs['_ARRAY_DIMENSIONS'] = list(dims)
    train = load(path, array_layout='no_channels')[0]
    assert train.spec.shape == (1, 8, 6) and train.spec.num_classes == 0
    out = capsys.readouterr().out
    assert 'not used: n (axis) float64 (40,), x (axis) float64 (6,), y (axis) float64 (8,)' in out
    assert 'cond_' not in out


def test_netcdf_is_unpacked_and_its_missing_values_are_not_numbers(load, tmp_path):
    with netCDF4.Dataset(tmp_path / 'x.nc', 'w', format='NETCDF3_CLASSIC') as file:
        file.createDimension('n', 40)
        file.createDimension('d', 2)
        packed = file.createVariable('x', 'i2', ('n', 'd'))
        packed.scale_factor, packed.add_offset = 0.5, 10.0
        packed[:] = np.arange(80).reshape(40, 2) / 2
        file.createVariable('cond_k', 'f4', ('n',), fill_value=-9.0)[:] = np.arange(40)
    train = load(tmp_path / 'x.nc')[0]
    x, cond = train.everything()[0], train.everything().cond['k']
    assert train.spec.scale == 'float' and torch.equal(x[:, 0], cond)
    for name, words in (('cond_k', "condition 'k': 1 of 40 items hold NaN.*number 7"), ('x', 'x: 1 of 40.*number 7')):
        with netCDF4.Dataset(tmp_path / 'x.nc', 'a') as file:
            file[name][7] = np.ma.masked
        with pytest.raises(SettingError, match=words):
            load(tmp_path / 'x.nc')
        with netCDF4.Dataset(tmp_path / 'x.nc', 'a') as file:
            file[name][7] = 0
    write(tmp_path / 'y.nc', dict(x=DATA['x'], cond_k=np.arange(40)))
    with netCDF4.Dataset(tmp_path / 'y.nc', 'a') as file:
        file['cond_k'][7] = np.ma.masked
    with pytest.raises(SettingError, match=r'cond_k of y\.nc has missing values'):
        load(tmp_path / 'y.nc')


@pytest.mark.parametrize(
    ('ending', 'package'), [('.zarr', 'zarr'), ('.h5', 'h5py'), ('.hdf5', 'h5py'), ('.nc', 'netCDF4')]
)
def test_an_absent_package_is_named(load, tmp_path, monkeypatch, ending, package):
    path = write(tmp_path / f'x{ending.replace("df", "")}', DATA).rename(tmp_path / f'x{ending}')
    monkeypatch.setitem(sys.modules, package, None)  # so that its import fails
    words = rf"data_path='.*x\{ending}': this needs the {package} package: pip install {package} \(.*{package}"
    with pytest.raises(SettingError, match=words) as caught:
        load(path)
    assert '\n' not in str(caught.value)


def test_files_that_cannot_be_read_are_named(load, tmp_path):
    for name in ('x.h5', 'x.nc'):
        (tmp_path / name).write_bytes(b'1 2 3')
        with pytest.raises(SettingError, match=rf'{name}.* cannot be read by .*Copy it again'):
            load(tmp_path / name)
    (tmp_path / 'x.zarr').mkdir()
    with pytest.raises(SettingError, match=r'x\.zarr.* cannot be read by zarr'):
        load(tmp_path / 'x.zarr')
    with pytest.raises(SettingError, match='there is no such file'):
        load(tmp_path / 'gone.zarr')
    with h5py.File(write(tmp_path / 'p.h5', DATA), 'a') as file:
        file['x'].attrs['scale_factor'] = 2.0
    with pytest.raises(SettingError, match=r'x of p\.h5 has scale_factor'):
        load(tmp_path / 'p.h5')


def test_a_damaged_row_is_named(load, tmp_path, monkeypatch):
    path = write(tmp_path / 'x.zarr', DATA, x=(1, 1, 8, 8))
    monkeypatch.setattr(arrays, 'LARGEST_SHUFFLED', 100)
    train, _, test = load(path)
    for file in (path / 'x').rglob('*'):
        if file.is_file() and 'z' not in file.name:  # not .zarray or zarr.json
            file.write_bytes(b'1 2 3')
    with pytest.raises(DataError, match=r'x of x\.zarr cannot be read'):
        for loader in (train, test):
            loader.take(range(loader.size))
    monkeypatch.undo()
    with pytest.raises(SettingError, match=r'x of x\.zarr cannot be read'):
        load(path)


def test_large_chunks_are_reported(load, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arrays, 'LARGEST_SHUFFLED', 100)
    for ending in ('.h5', '.zarr', '.nc'):
        load(write(tmp_path / f'x{ending}', dict(x=DATA['x']), x=(20, 1, 8, 8)))
        out = capsys.readouterr().out
        assert 'A chunk of it holds 20 rows' in out and 'A prepared file is faster' in out
        load(write(tmp_path / f'y{ending}', DATA, x=(1, 1, 8, 8)))
        assert 'A prepared file' not in capsys.readouterr().out  # it would hold no conditions


SETTINGS = dict(dataset='arrays', num_training_steps=12, save_every=4, lr_schedule_type='constant')


def test_a_run_is_sampled_with_held_out_conditions_of_the_same_file(tiny_config, build_trainer, tmp_path):
    data = {name: x for name, x in DATA.items() if name != 'x1'}
    path = write(tmp_path / 'x.h5', data)
    config = tiny_config(**SETTINGS, data_path=str(path), experiment_name='run')
    trainer = build_trainer(config)
    run_record.write_start(config, ExampleDiffusionTrainer, trainer.device)
    trainer.checkpoints.save(0, wait=True)
    inputs, held_out = trainer.sample_inputs(3), trainer.test_loader.everything()
    assert {name: tuple(x.shape) for name, x in inputs.cond.items()} == {'hot': (3,), 'wind': (3, 2)}
    assert all((held_out.cond['wind'] == row).all(1).any() for row in inputs.cond['wind'])
    assert_same(load_run(config.run_dir).sample_inputs(3).cond, inputs.cond)
    moved = str(path.rename(tmp_path / 'y.h5'))
    run = load_run(config.run_dir)
    assert run.data.conditions == ('hot', 'wind') and run.network.net.conditions.shapes == {'hot': (), 'wind': (2,)}
    with pytest.raises(
        SettingError, match=r"this needs the data of the run.*data_path='.*x\.h5': there is no such file"
    ):
        run.sample_inputs(3)
    assert_same(load_run(config.run_dir, data_path=moved).sample_inputs(3).cond, inputs.cond)
    del data['cond_wind']
    other = load_run(config.run_dir, data_path=str(write(tmp_path / 'z.h5', data)))
    with pytest.raises(SettingError, match=r'conditions: hot \(\), wind \(2,\), not .* conditions: hot \(\)\.'):
        other.sample_inputs(3)


@pytest.mark.slow
@pytest.mark.parametrize('ending', ['.zarr', '.h5', '.nc'])
def test_runs_are_the_same_by_rows_on_two_processes_and_resumed(tmp_path, ending):
    data = DATA if ending == '.zarr' else {name: x for name, x in DATA.items() if name != 'x1'}
    path = write(tmp_path / f'x{ending}', data)
    script = tmp_path / 'rows.py'
    script.write_text('from data_loading import arrays\nfrom main import main\n\narrays.LARGEST_SHUFFLED = 100\n\n'
                      "if __name__ == '__main__':\n    main()\n")  # fmt: skip
    shared = SETTINGS | dict(data_path=path, ckpt_dir=tmp_path)

    def run(name, *scripts, **more):
        job = start_run_sh(*scripts, **shared | dict(experiment_name=name) | more)
        out, error = job.communicate(timeout=200)
        assert job.returncode == 0, error
        return out

    assert 'conditions: hot (), wind (2,)' in run('whole')
    run('two', script, num_workers=2, nproc=2)
    assert losses(tmp_path / 'two') == pytest.approx(losses(tmp_path / 'whole'), rel=1e-4)
    if ending != '.zarr':
        return
    run('rows', script, num_workers=0)
    run('workers', script, num_workers=2)
    assert losses(tmp_path / 'rows') == losses(tmp_path / 'workers') == losses(tmp_path / 'whole')
    run('resumed', script, num_workers=2, num_training_steps=8)
    run('resumed', script, num_workers=2)
    assert_same_runs(tmp_path / 'resumed', tmp_path / 'workers')
