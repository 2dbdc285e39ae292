"""Configs and command lines, as users see them.

    python -m tests.golden.test_surfaces --write

writes `data/configs.json.gz` and `data/flags.json`, and prints each difference to what was there;
the tests read only what is checked in.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

from mmengine.config import Config

from vqmoe_vision.engine.cli import load_config

from . import probe
from .probe import differences

DATA = Path(__file__).parent / 'data'
CAMVID = 'segmentation/segmenter_vit-t-vqmoe_mask_8xb1-20k_camvid-352x480.py'


def read_flags() -> dict[str, Any]:
    return json.loads((DATA / 'flags.json').read_text())


def read_configs() -> dict[str, dict[str, str]]:
    return json.loads(gzip.decompress((DATA / 'configs.json.gz').read_bytes()))


def test_every_config_is_as_it_was():
    assert not list(differences(probe.configs(), read_configs()))


def test_a_config_elsewhere_builds_on_one_of_the_package(tmp_path, monkeypatch):
    """By name in our tools, and by path in any program of mmengine or mmseg."""
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / 'mine.py'
    mine.write_text("_base_ = 'vqmoe_vision::classification/cifar10.py'\nmodel = dict(depth=5)\n")
    found = probe.flat(load_config(str(mine), {'train_cfg.max_epochs': 7}).to_dict())
    expected = read_configs()['classification/cifar10.py']
    expected |= {'model.depth': '5', 'train_cfg.max_epochs': '7'}
    assert {name: found.get(name) for name in expected} == expected
    path = f"__import__('vqmoe_vision').config_path({CAMVID!r})"
    mine.write_text(f'_base_ = {path}\nmodel = dict(backbone=dict(depth=3))\n')
    found = probe.flat(Config.fromfile(mine).to_dict())
    assert not [*differences(found, read_configs()[CAMVID] | {'model.backbone.depth': '3'})]


def test_every_program_has_the_flags_it_had():
    assert not [*differences(probe.flags(), read_flags())]


def write_all() -> None:
    """Writes all data anew."""
    configs, flags = probe.configs(), probe.flags()
    print(*differences(configs, read_configs()), *differences(flags, read_flags()), sep='\n')
    packed = gzip.compress(json.dumps(configs, sort_keys=True).encode(), mtime=0)
    (DATA / 'configs.json.gz').write_bytes(packed)
    probe.write(DATA / 'flags.json', flags)


if __name__ == '__main__':
    if sys.argv[1:] != ['--write']:
        sys.exit(__doc__)
    write_all()
