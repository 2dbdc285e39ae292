"""Configs by name, on the command line and as `_base_`."""

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
    # nothing tells registries to look for a package
    assert '_scope_' not in load_config(str(path)).dump()
    if base.startswith('__import__'):  # as any program of mmengine reads it
        assert Config.fromfile(path).to_dict() == expected


@pytest.mark.parametrize('base', [False, True])
def test_one_that_the_package_lacks_is_named(base: bool, tmp_path: Path) -> None:
    (path := tmp_path / 'mine.py').write_text("_base_ = 'vqmoe_vision::classification/cifr10.py'\n")
    with pytest.raises(FileNotFoundError, match=r'classification/cifr10\.py'):
        load_config(str(path) if base else 'vqmoe_vision::classification/cifr10.py')
    gc.collect()  # mmengine leaves the copy of the config open that it was reading
