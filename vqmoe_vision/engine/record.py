"""What a run says of itself: every number, where it comes from, and which weights have it."""

import json
import os
import time
from hashlib import sha256
from itertools import pairwise
from os.path import relpath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from vqmoe_vision.models.compat import StateDict
from vqmoe_vision.models.create import options_in_full
from vqmoe_vision.models.moe_vit import complexity, count_params
from vqmoe_vision.models.normalization import KEY
from vqmoe_vision.models.weights import OF_TIMM, is_file_name
from vqmoe_vision.moe.config import check
from vqmoe_vision.provenance import commit, installed, processor

from .checkpoint import read_state
from .checkpoint_files import write_atomically
from .config import flat
from .model import unwrapped
from .step_values import read_now

BEGUN = 'begun.json'
FIRST_LOSSES = 20
PACKAGES = ('torch', 'timm', 'onedl-mmengine', 'onedl-mmsegmentation', 'vqmoe-vision')


@HOOKS.register_module()
class RunRecordHook(Hook):
    """Writes `run.json` into the work dir when training ends, `progress` while it goes on.

    The record is of the whole run, also where it was resumed: MoE options in full, data, starting
    weights, first losses, time of work. `begun.json` has options and weights from the start on,
    and a test writes `data.json` and `correct.json`.

    Args:
        only_first: End the run, successfully, after the first `FIRST_LOSSES` iterations.

    Raises:
        ValueError: A run that is resumed began with other options of its MoE layers, or other data.
    """

    def __init__(self, only_first: bool = False) -> None:
        self.only_first = only_first
        self._before = {'minutes': 0.0, 'cpu_minutes': 0.0}
        self._commits: list[str | None] = []
        self._held_out: list[list[Any]] = []
        self._then: dict[str, Any] = {}
        self._resumed = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Goes on with the record of a run that is resumed."""
        self._resumed = runner._resume  # which a run that finds nothing to go on with has too
        if self._resumed and 'run_record' in checkpoint:
            self._before, self._commits, self._held_out, self._then = checkpoint['run_record']

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Leaves the record so far in the checkpoint."""
        began = _beginning(self._begun['moe_options'], self._data)
        checkpoint['run_record'] = [self._spent(), self._commits, self._held_out, began]

    def before_train(self, runner: Runner) -> None:
        """Starts the clocks, and counts before the work rather than after it."""
        model = runner.cfg.to_dict()['model']
        options = options_in_full(model.get('backbone', model))
        self._data = _data(runner, ('train', 'val'))
        now = _beginning(options, self._data)
        for name, value in self._then.items():
            allowed = f'{value!r}, as when the run began that is resumed; else take a new work dir'
            check(now.get(name) == value, name, now.get(name), allowed)
        begun = Path(runner.work_dir) / BEGUN
        if self._resumed and begun.is_file():
            # as its experts were made then: no check above looks at `upcycling`, or at a checkpoint
            self._begun = json.loads(begun.read_text())
        else:
            self._begun = {'moe_options': options}
            if not self._resumed:  # or it began without this hook: today's may be others
                weights = starting_weights(runner.cfg.model, runner._load_from)
                self._begun['starting_weights'] = weights
            self._write(runner, BEGUN, json.dumps(self._begun))
        whole = unwrapped(runner)
        self._size = *count_params(whole), complexity(whole.routed_model).macs
        self._start = time.perf_counter(), time.process_time()
        if (at := commit()) not in self._commits:
            self._commits.append(at)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        """Keeps a point of the learning curves."""
        metrics.update({name: float(value) for name, value in metrics.items()})
        # no copy: hooks that come later add the routing of the pass to it
        self._held_out.append([runner.iter, metrics])

    def before_test(self, runner: Runner) -> None:
        """Writes `data.json`: which data the test sees."""
        self._write(runner, 'data.json', json.dumps(_data(runner, ('test',))))

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Writes `correct.json`: which test images are right, of a metric that says so."""
        for metric in runner.test_loop.evaluator.metrics:
            if bits := getattr(metric, 'correct', ''):
                self._write(runner, 'correct.json', json.dumps({'correct': bits}))

    def after_train_iter(self, runner: Runner, batch_idx: int, *_: Any, **__: Any) -> None:
        """Says how far the run is, a hundred times."""
        done = runner.iter + 1
        if self.only_first and done >= FIRST_LOSSES:
            read_now(runner)
            self.after_train(runner)
            raise SystemExit(0)  # the loop over an epoch knows no other end
        if done % max(runner.max_iters // 100, 1) == 0:
            self._write(runner, 'progress', f'{done} {runner.max_iters}\n')

    def after_train(self, runner: Runner) -> None:
        """Writes the record."""
        losses = runner.message_hub.get_scalar('train/loss').data[0]
        cuda = torch.cuda.is_available()
        record = {
            'seed': runner.seed,
            'commit': ' '.join(str(name) for name in self._commits),
            'versions': {p: v for p in PACKAGES if (v := installed(p))},
            'device': 'cuda' if cuda else 'cpu',
            'hardware': torch.cuda.get_device_name() if cuda else processor(),
            'threads': torch.get_num_threads(),
            **{name: round(value, 3) for name, value in self._spent().items()},
            'iterations': runner.max_iters,
            **dict(zip(('params', 'active_params', 'macs'), self._size, strict=True)),
            **self._begun,
            'data': self._data,
            'first_losses': losses[:FIRST_LOSSES].tolist(),
            'training_loss': _thinned(losses),
            'held_out': self._held_out,
        }
        self._write(runner, 'run.json', json.dumps(record))

    def _spent(self) -> dict[str, float]:
        seconds = (time.perf_counter() - self._start[0], time.process_time() - self._start[1])
        return {k: v + s / 60 for (k, v), s in zip(self._before.items(), seconds, strict=True)}

    @staticmethod
    @master_only
    def _write(runner: Runner, name: str, text: str) -> None:
        path = Path(runner.work_dir) / name
        partial = path.with_name(f'{name}.part')
        partial.write_text(text)
        partial.replace(path)  # whoever reads it meanwhile finds the old or the new, never half


def _data(runner: Runner, splits: tuple[str, ...]) -> dict[str, Any]:
    return {
        split: described(getattr(runner, f'{split}_dataloader').dataset)
        for split in splits
        if runner.cfg.get(f'{split}_dataloader') is not None
    }


def _beginning(options: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """What a run that is resumed has to have again, by name; its experts are made already."""
    moe = {f'moe.{n}': v for n, v in options.items() if n != 'upcycling'}
    return moe | {f'data.{n}': v for n, v in data.items()}


def _thinned(losses: np.ndarray) -> list[list[float]]:
    """Pairs of an iteration and the mean loss up to it since the pair before."""
    ends = np.linspace(0, len(losses), min(60, len(losses)) + 1).astype(int)
    return [[int(end), round(float(losses[start:end].mean()), 5)] for start, end in pairwise(ends)]


def described(dataset: Any) -> dict[str, Any]:
    """The number of samples, and a digest of what they are called, in their order."""
    names = getattr(dataset, 'names', None)
    if isinstance(dataset, BaseDataset):
        infos = map(dataset.get_data_info, range(len(dataset)))
        places = [[i[kind] for kind in ('img_path', 'seg_map_path') if kind in i] for i in infos]
        root = dataset.data_root or '.'
        names = [' '.join(relpath(place, root) for place in of_one) for of_one in places]
    digest = None if names is None else sha256('\n'.join(names).encode()).hexdigest()[:16]
    return {'samples': len(dataset), 'digest': digest}


# Options of models, and of a `pretrained_cfg_overlay`, whose files are weights under any name.
_NAME_WEIGHTS = ('checkpoint', 'checkpoint_path', 'features', 'file', 'load_from', 'upcycle')


def starting_weights(model: ConfigDict, load_from: str | None = None) -> dict[str, str]:
    """Digests of all weights on this machine that the config of a run names."""
    found = {}
    for name, value in {**flat(model.to_dict(), 'model'), 'load_from': load_from}.items():
        path = os.path.expanduser(str(value).removeprefix('local-dir:'))
        # not any folder: an entry point may be called as one is
        meant = name.rpartition('.')[2] in _NAME_WEIGHTS or is_file_name(path)
        files = [*([path] if meant else []), *(os.path.join(path, file) for file in OF_TIMM)]
        if isinstance(value, str) and any(map(os.path.isfile, files)):
            found[name] = digest_of(read_state(path))
    return found


def digest_of(state: StateDict) -> str:
    """What tells weights from others: 16 digits of the sha256 of their names and values."""
    digest = sha256()
    for name, value in sorted(state.items()):
        digest.update(f'{name} {value.dtype} {list(value.shape)}\n'.encode())
        # numpy has no bfloat16
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


# Name of the digest among the scores.
WEIGHTS = 'weights'


def write_numbers(path: Path, metrics: dict[str, Any], model: nn.Module) -> None:
    """Writes what a test has measured."""
    named = {**metrics, WEIGHTS: weights_digest(model)}
    content = f'{json.dumps(named, indent=2, default=float)}\n'
    if passed_on(path):
        path.write_text(content)
    else:
        write_atomically(path, content.encode())


def passed_on(path: Path) -> bool:
    """Whether what is written goes elsewhere, as into a pipe, /dev/stdout or what a link names."""
    return path.is_symlink() or (path.exists() and not path.is_file())


def weights_digest(model: nn.Module) -> str:
    """A digest of a run's model, which all files with the same weights have in common."""
    return digest_of({k: v for k, v in model.state_dict().items() if k != KEY})


def read_numbers(path: str, model: nn.Module, checkpoint: Path) -> dict[str, float]:
    """The scores of a model that `write_numbers` has written."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:  # not there, no text or no JSON
        raise ValueError(f'numbers={path!r} cannot be read: {error}') from error
    tested = values.pop(WEIGHTS, None) if isinstance(values, dict) else None
    own = weights_digest(model)
    other = (
        f'scores of the weights {own}, and these are of {tested}: test those of {checkpoint.name} '
        'again with --out, or name the checkpoint that was tested with --checkpoint'
    )
    check(tested == own, 'numbers', path, other)
    return values
