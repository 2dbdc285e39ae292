"""Trainings and tests by the tools, and what a training leaves in its work dir without one."""

import json
import re
from itertools import count
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS

from vqmoe_vision.engine import cli
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.model import scope_of
from vqmoe_vision.models.normalization import Normalization

NORMALIZATION = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def leave_run(folder: Path, config_file: str, options: dict[str, Any], classes: str) -> Any:
    """A work dir with a config and its last checkpoint, of random weights; returns the model."""
    config = load_config(config_file, options)
    with scope_of(config):
        model = MODELS.build(config.model)
    model.normalize_as(NORMALIZATION)
    folder.mkdir()
    config.dump(folder / 'run.py')
    meta = {'epoch': 1, 'iter': 2, 'seed': 7, 'dataset_meta': {'classes': tuple(classes)}}
    content = {'state_dict': model.state_dict(), 'meta': meta, 'message_hub': {}}
    torch.save(content, folder / 'epoch_1.pth')
    (folder / 'last_checkpoint').write_text('epoch_1.pth')
    return model.eval()


def leave_dense(file: Path, config: str, field: str, more: Any = None, **beside: Any) -> str:
    """A checkpoint of a dense model of the shape of a config's."""
    dense = {f'{field}.model_name': 'vit_tiny_patch16_224', f'{field}.moe': None}
    settings = load_config(config, {**(more or {}), **dense})
    with scope_of(settings):
        model = MODELS.build(settings.model)
    torch.save({'state_dict': {**model.state_dict(), **beside}}, file)
    return str(file)


def total_of(model: Any, entries: dict[str, Any], task: str, mlp: Any) -> torch.Tensor:
    """The loss: that of the task and all that `mlp`, of block 1, has, which logs its load."""
    auxiliary = {k for k in entries if 'loss' in k} - {task}
    assert all(key.startswith('blocks.1.mlp/') for key in auxiliary)
    assert bool(auxiliary) == getattr(mlp, 'needs_collecting', False)
    # without a router every expert has as much to do, and there is no load to report
    logged = model.logged_statistics.summary()
    assert ('blocks.1.mlp/load_max' in logged) == hasattr(mlp, 'router')
    total, _ = model.parse_losses(entries)
    torch.testing.assert_close(total, sum(entries[key] for key in auxiliary | {task}))
    return total


_NAMES = count()  # mmengine keeps one logger per name in a process


def train(config: str | Path, work: Path, *options: str, resume: bool = False) -> Path:
    arguments = [str(config), '--work-dir', str(work), *['--resume'] * resume]
    cli.train([*arguments, '--cfg-options', f'experiment_name=train {next(_NAMES)}', *options])
    return work


def score(config, checkpoint, work: Path, *options: str, arguments=()) -> dict[str, float]:
    out = work / 'scores.json'
    given = [str(config), str(checkpoint), '--work-dir', str(work), '--out', str(out), *arguments]
    cli.test([*given, '--cfg-options', f'experiment_name=test {next(_NAMES)}', *options])
    return json.loads(out.read_text())


# in a file the year stands in front of what a terminal shows
_DATE = r'\d{4}/(?=\d\d/\d\d \d\d:\d\d:\d\d - mmengine - )'


def messages(work_dir: Path) -> list[str]:
    """What a terminal shows of each message, one or more lines."""
    (log,) = work_dir.glob('*/*.log')
    return [part.rstrip('\n') for part in re.split(f'^{_DATE}', log.read_text(), flags=re.M)[1:]]


def reports(work_dir: Path) -> list[str]:
    """Messages with losses, scores, or the load of experts."""
    told = re.compile(r'INFO - (Iter|Epoch)\(|INFO - (train_epoch|val|test)  ')
    return [message for message in messages(work_dir) if told.search(message)]
