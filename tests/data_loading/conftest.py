"""A folder for images, and a Config that reads it."""

import pytest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'images').mkdir()
    return tmp_path / 'images'


@pytest.fixture
def config_of(tiny_config, folder):
    default = dict(dataset='image_folder', data_path=str(folder), image_size=(8,), num_workers=0)
    return lambda **settings: tiny_config(**(default | settings))
