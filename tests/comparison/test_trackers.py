"""Rows as runs of trackio, read back from the file of SQLite that it keeps."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip('trackio')


def entries(file: Path) -> list[tuple[str, int, dict]]:
    """The run, the step and the numbers of each."""
    with closing(sqlite3.connect(file)) as known:
        found = known.execute('select run_name, step, metrics from metrics order by id')
        return [(name, step, json.loads(numbers)) for name, step, numbers in found]


def test_rows_are_runs(fill, says, tmp_path, monkeypatch):
    for module in ('utils', 'sqlite_storage'):
        monkeypatch.setattr(f'trackio.{module}.TRACKIO_DIR', tmp_path)
    file = tmp_path / 'spec.db'
    path = fill({'dense': [60.0, 61.0], 'moe': [62.5]}, 'seeds = [1, 2]\n')
    assert '3 runs' in says('export', path, '--to', 'trackio')
    # two points of each curve, the later one with the test
    found = entries(file)
    assert [(name, step) for name, step, _ in found] == [
        (name, step) for name in ('dense-seed1', 'moe-seed1', 'dense-seed2') for step in (1, 2)
    ]
    assert found[2][2] == {'train/loss': 2.0, 'val/mIoU': 31.25}
    assert found[3][2].items() >= {'train/loss': 1.0, 'val/mIoU': 62.5, 'test/mIoU': 62.5}.items()
    assert found[3][2]['test/blocks.3.mlp/load_unused'] == 1.0
    with closing(sqlite3.connect(file)) as known:
        ((config,),) = known.execute("select config from configs where run_name = 'moe-seed1'")
    assert json.loads(config).items() >= {'row': 'moe', 'seed': 1, 'macs': 10**7}.items()
    # once more, they are in the place of those before
    says('export', path, '--to', 'trackio', '--rows', 'moe')
    assert sorted(entries(file), key=str) == sorted(found, key=str)
