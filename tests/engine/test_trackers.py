"""A training whose numbers go to trackio."""

import json
import sqlite3
from contextlib import closing

import pytest

from ..runs import train
from .test_publish import CONFIG

pytest.importorskip('trackio')


def test_a_training_logs_to_trackio(tmp_path, monkeypatch):
    from trackio import sqlite_storage, utils

    for module in (utils, sqlite_storage):
        monkeypatch.setattr(module, 'TRACKIO_DIR', tmp_path / 'trackio')
    backend = 'visualizer.vis_backends.1'
    options = [f'{backend}.type=TrackioVisBackend', f'{backend}.init_kwargs.name=mine']
    small = ['model.depth=2', 'model.embed_dim=12', 'train_cfg.max_epochs=1']
    small += ['train_cfg.val_interval=1', 'default_hooks.logger.interval=5']
    train(CONFIG, tmp_path / 'work', *options, *small)
    (log,) = (tmp_path / 'work').glob('*/vis_data/scalars.json')
    expected = [json.loads(line) for line in log.read_text().splitlines()]
    with closing(sqlite3.connect(tmp_path / 'trackio/vqmoe_vision.db')) as file:
        found = file.execute('select run_name, step, metrics from metrics order by id').fetchall()
        ((config,),) = file.execute('select config from configs')
    assert {name for name, _, _ in found} == {'mine'} and len(found) == len(expected)
    for (_, step, numbers), line in zip(found, expected, strict=True):
        named = {'time_per_iter' if n == 'time' else n: value for n, value in line.items()}
        assert (step, json.loads(numbers)) == (named.pop('step'), named)
    assert json.loads(config)['model']['embed_dim'] == 12
