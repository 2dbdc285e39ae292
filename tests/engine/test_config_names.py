"""Configs by name, on the command line and as `_base_`; a name that is wrong gets the nearest."""

import gc
from pathlib import Path

import pytest
from mmengine.config import Config

from vqmoe_vision import config_path
from vqmoe_vision.engine.cli import load_config

from ..rows import CONFIGS

CIFAR = 'classification/cifar10.py'
NAME = f'vqmoe_vision::{CIFAR}'


def test_a_config_of_the_package_by_name() -> None:
    assert Path(config_path(CIFAR)) == CONFIGS / CIFAR
    options = {'train_cfg.max_epochs': 3}
    assert load_config(NAME, options).to_dict() == (
        load_config(str(CONFIGS / CIFAR), options).to_dict()
    )


@pytest.mark.parametrize(
    'base', [repr(NAME), f'[{NAME!r}]', f'__import__("vqmoe_vision").config_path({CIFAR!r})']
)
def test_a_config_outside_builds_on_it(base: str, tmp_path: Path) -> None:
    path = tmp_path / 'mine.py'
    path.write_text(f'_base_ = {base}\nmodel = dict(num_classes=7)\n')
    expected = load_config(NAME, {'model.num_classes': 7}).to_dict()
    assert load_config(str(path)).to_dict() == expected
    # as mmengine reads it, and nothing tells registries to look for a package
    assert Config.fromfile(path).to_dict() == expected
    assert '_scope_' not in Config.fromfile(path).dump()


@pytest.mark.parametrize(
    ('name', 'nearest'),
    [
        ('vqmoe_vision::classification/cifar1.py', NAME),
        ('vqmoe_vision::clasification/cifar10.py', NAME),
        ('classification/cifar10.py', NAME),
        ('configs/classification/cifar10.py', NAME),
        ('elsewhere/configs/classification/cifar10.py', NAME),
        (f'{CONFIGS}/classification/cifar1.py', f'{CONFIGS}/classification/cifar10.py'),
        (f'{CONFIGS}/_base_/models/segmentr.py', f'{CONFIGS}/_base_/models/segmenter.py'),
        ('my_confg.py', 'my_config.py'),
    ],
)
def test_a_wrong_name_gets_the_nearest(
    name: str, nearest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my_config.py').touch()
    with pytest.raises(FileNotFoundError) as error:
        load_config(name)
    assert str(error.value) == f'config {name!r} does not exist; did you mean {nearest}?'


def test_a_name_like_no_other_gets_none() -> None:
    with pytest.raises(FileNotFoundError, match=r"^config 'xyz/qqqq\.py' does not exist$"):
        load_config('xyz/qqqq.py')


def test_a_file_that_is_no_config_by_its_name(tmp_path: Path) -> None:
    (path := tmp_path / 'results.md').touch()
    with pytest.raises(ValueError, match=r"results\.md' must end in \.py, \.yml, \.yaml, \.json$"):
        load_config(str(path))


# mmengine leaves the copy of the config open that it was reading
@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
def test_a_base_that_the_package_lacks(tmp_path: Path) -> None:
    path = tmp_path / 'mine.py'
    path.write_text("_base_ = 'vqmoe_vision::classification/cifr10.py'\n")
    with pytest.raises(FileNotFoundError) as error:
        load_config(str(path))
    assert str(error.value) == (
        f"config 'vqmoe_vision::classification/cifr10.py', on which '{path}' builds, does not "
        f'exist; did you mean {NAME}?'
    )
    del error
    gc.collect()
