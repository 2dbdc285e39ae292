"""Configs, command lines and tables of comparisons, as users see them.

    python -m tests.golden.test_surfaces --write

writes `data/configs.json.gz`, `data/flags.json` and `data/tables.json`, and prints each difference
to what was there; the tests read only what is checked in.
"""

import csv
import gzip
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.runner import Runner

from .. import cases
from . import probe
from .probe import differences

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / 'data'
ROWS = ROOT / 'docs/results/rows'
CAMVID = 'segmentation/segmenter_vit-t-vqmoe_mask_8xb1-20k_camvid-352x480.py'
COMPARISONS = [ROOT / f'configs/comparisons/{rows.name}.py' for rows in sorted(ROWS.iterdir())]
SHORT = 'cifar100_budget', 'cifar10_methods'  # with numbers of dev; with all methods

# Of a line of `docs/results/tables/*.csv`, which `tools/compare.py table` writes.
FIELDS = ('seeds', 'score', 'std', 'pairs', 'difference', 'low', 'high', 'p', 'p_holm')
FIELDS += ('held_out_difference', 'held_out_low', 'held_out_high')


def read(name: str) -> Any:
    return json.loads((DATA / f'{name}.json').read_text())


def read_configs() -> dict[str, dict[str, str]]:
    return json.loads(gzip.decompress((DATA / 'configs.json.gz').read_bytes()))


def table(spec: Path) -> dict[str, dict[str, float]]:
    """Numbers of a comparison's main table by its name and row, of the rows that are checked in."""

    def draw(*_: Any, **__: Any) -> None:
        raise probe.Taken(None)  # figures come after the tables, and take most of the time

    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        patched.setattr(Figure, '__init__', draw)
        (Path(folder) / 'rows').symlink_to(ROWS)
        spec = spec.relative_to(ROOT)
        probe.run('tools/compare.py', 'table', str(spec), '--results', folder)
        with (Path(folder) / f'tables/{spec.stem}.csv').open() as file:
            lines = list(csv.DictReader(file))
    return {
        f'{spec.stem}/{line["row"]}': {name: float(line[name]) for name in FIELDS if line.get(name)}
        for line in lines
    }


def test_every_config_is_as_it_was():
    assert not list(differences(probe.configs(ROOT), read_configs()))


@pytest.fixture
def outside(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'mine.py'


def test_a_config_elsewhere_builds_on_one_of_the_package_by_name(outside, monkeypatch):
    """Up to where the tool gives it to mmengine, with an option of the command line on top."""

    def take(config: Config) -> None:
        raise probe.Taken(config)

    monkeypatch.setattr(Runner, 'from_cfg', take)
    (outside.parent / 'data/cifar10').mkdir(parents=True)  # the tool wants to see a folder
    base = 'vqmoe_vision::classification/cifar10.py'
    outside.write_text(f'_base_ = {base!r}\nmodel = dict(depth=5)\n')
    tool = str(ROOT / 'tools/train.py')
    config = probe.run(tool, str(outside), '--cfg-options', 'train_cfg.max_epochs=7')
    found = probe.flat(config.to_dict(), ROOT)
    expected = read_configs()['classification/cifar10.py']
    expected |= {'model.depth': '5', 'train_cfg.max_epochs': '7'}
    assert {name: found.get(name) for name in expected} == expected


def test_a_config_elsewhere_builds_on_one_of_the_package_by_path(outside):
    """As any program of mmengine or mmseg reads it."""
    path = f"__import__('vqmoe_vision').config_path({CAMVID!r})"
    outside.write_text(f'_base_ = {path}\nmodel = dict(backbone=dict(depth=3))\n')
    found = probe.flat(Config.fromfile(outside).to_dict(), ROOT)
    expected = read_configs()[CAMVID] | {'model.backbone.depth': '3'}
    assert not list(differences(found, expected))


def test_every_program_has_the_flags_it_had():
    assert not list(differences(probe.flags(ROOT), read('flags')))


PARAMS = (pytest.param(s, marks=[pytest.mark.pages] * (s.stem not in SHORT)) for s in COMPARISONS)


@cases('spec', *PARAMS, ids=lambda spec: spec.stem)
def test_numbers_of_tables_are_those_of_the_rows(spec):
    recorded = {n: row for n, row in read('tables').items() if n.startswith(f'{spec.stem}/')}
    assert not list(differences(table(spec), recorded))


def write(name: str, content: dict[str, Any]) -> None:
    file = DATA / f'{name}.json'
    print(*differences(content, read(name) if file.is_file() else {}, f'{name}: '), sep='\n')
    probe.write(file, content)


def write_all() -> None:
    """Writes all data anew."""
    configs, packed = probe.configs(ROOT), DATA / 'configs.json.gz'
    print(*differences(configs, read_configs() if packed.is_file() else {}), sep='\n')
    packed.write_bytes(gzip.compress(json.dumps(configs, sort_keys=True).encode(), mtime=0))
    write('flags', probe.flags(ROOT))
    write('tables', {name: row for spec in COMPARISONS for name, row in table(spec).items()})


if __name__ == '__main__':
    if sys.argv[1:] != ['--write']:
        sys.exit(__doc__)
    write_all()
