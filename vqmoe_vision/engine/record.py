"""What a run says of itself: every number, where it comes from, which weights have it, its routing.

Legend: E experts, M codes.
"""

import json
import os
import re
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
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, LOG_PROCESSORS
from mmengine.runner import LogProcessor, Runner
from torch import Tensor, nn

from vqmoe_vision.models.compat import StateDict
from vqmoe_vision.models.create import options_in_full
from vqmoe_vision.models.moe_vit import complexity, count_params
from vqmoe_vision.models.normalization import KEY
from vqmoe_vision.models.weights import OF_TIMM, is_file_name
from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.codebooks import Codebook
from vqmoe_vision.moe.config import check, check_type
from vqmoe_vision.moe.layer import MoeLayer
from vqmoe_vision.provenance import commit, installed, processor

from .checkpoint import read_state
from .checkpoint_files import write_atomically
from .config import flat
from .model import RoutingStatistics, unwrapped
from .sharded import whole
from .step_values import read_now

FIRST_LOSSES = 20
PACKAGES = ('torch', 'timm', 'onedl-mmengine', 'onedl-mmsegmentation', 'vqmoe-vision')


@HOOKS.register_module()
class RunRecordHook(Hook):
    """Writes `run.json` into the work dir when training ends, `progress` while it goes on.

    The record is of the whole run, also where it was resumed: MoE options in full, data, starting
    weights, first losses, time of work. A test writes `data.json` and `correct.json`.

    Args:
        only_first: End the run, successfully, after the first `FIRST_LOSSES` iterations.

    Raises:
        ValueError: A run that is resumed began with other options of its MoE layers, or other data.
    """

    def __init__(self, only_first: bool = False) -> None:
        self.only_first = only_first
        # of the whole run, as checkpoints have it
        self._kept: dict[str, Any] = {'minutes': 0.0, 'cpu_minutes': 0.0}
        self._kept |= {'commits': [], 'held_out': [], 'begun': {}}
        self._resumed = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Goes on with the record of a run that is resumed."""
        self._resumed = runner._resume  # which a run that finds nothing to go on with has too
        if self._resumed:
            self._kept = checkpoint.get('run_record', self._kept)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Leaves the record so far in the checkpoint."""
        checkpoint['run_record'] = {**self._kept, **self._spent()}

    def before_train(self, runner: Runner) -> None:
        """Starts the clocks, and counts before the work rather than after it."""
        model = runner.cfg.to_dict()['model']
        options = options_in_full(model.get('backbone', model))
        now = {'moe_options': options, 'data': _data(runner, ('train', 'val'))}
        begun = self._kept['begun']
        for part in now if begun else ():
            for name, value in begun[part].items():
                allowed = f'{value!r}, as when the run began that is resumed; or a new work dir'
                same = now[part].get(name) == value or name == 'upcycling'  # experts are made
                check(same, f'{part.removesuffix("_options")}.{name}', now[part].get(name), allowed)
        if not begun:
            begun |= now
            if not self._resumed:  # or it began without this hook: today's may be others
                begun['starting_weights'] = starting_weights(runner.cfg.model, runner._load_from)
        size, work = count_params(unwrapped(runner)), complexity(unwrapped(runner).routed_model)
        self._size = dict(zip(('params', 'active_params', 'macs'), (*size, work.macs), strict=True))
        self._start = _clocks()
        if (at := commit()) not in self._kept['commits']:
            self._kept['commits'].append(at)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        """Keeps a point of the learning curves."""
        metrics.update({name: float(value) for name, value in metrics.items()})
        # no copy: hooks that come later add the routing of the pass to it
        self._kept['held_out'].append([runner.iter, metrics])

    def before_test(self, runner: Runner) -> None:
        """Writes `data.json`: which data the test sees."""
        _write(runner, 'data.json', json.dumps(_data(runner, ('test',))))

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Writes `correct.json`: which test images are right, of a metric that says so."""
        for metric in runner.test_loop.evaluator.metrics:
            if bits := getattr(metric, 'correct', ''):
                _write(runner, 'correct.json', json.dumps({'correct': bits}))

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Says how far the run is, a hundred times."""
        done = runner.iter + 1
        if self.only_first and done >= FIRST_LOSSES:
            read_now(runner)
            self.after_train(runner)
            raise SystemExit(0)  # the loop over an epoch knows no other end
        if done % max(runner.max_iters // 100, 1) == 0:
            _write(runner, 'progress', f'{done} {runner.max_iters}\n')

    def after_train(self, runner: Runner) -> None:
        """Writes the record."""
        losses = runner.message_hub.get_scalar('train/loss').data[0]
        cuda = torch.cuda.is_available()
        record = {
            'seed': runner.seed,
            'commit': ' '.join(str(name) for name in self._kept['commits']),
            'versions': {p: v for p in PACKAGES if (v := installed(p))},
            'device': 'cuda' if cuda else 'cpu',
            'hardware': torch.cuda.get_device_name() if cuda else processor(),
            'processes': get_world_size(),
            'threads': torch.get_num_threads(),
            **{name: round(value, 3) for name, value in self._spent().items()},
            'iterations': runner.max_iters,
            **self._size,
            **self._kept['begun'],
            'first_losses': losses[:FIRST_LOSSES].tolist(),
            # iterations, and the mean loss up to each since the one before
            'training_loss': [
                [int(end), round(float(losses[start:end].mean()), 5)]
                for start, end in pairwise(
                    np.linspace(0, len(losses), min(60, len(losses)) + 1).astype(int)
                )
            ],
            'held_out': self._kept['held_out'],
        }
        _write(runner, 'run.json', json.dumps(record))

    def _spent(self) -> dict[str, float]:
        return {
            name: self._kept[name] + (at - self._start[name]) / 60 for name, at in _clocks().items()
        }


def _clocks() -> dict[str, float]:
    return {'minutes': time.perf_counter(), 'cpu_minutes': time.process_time()}


def _write(runner: Runner, name: str, text: str) -> None:
    if is_main_process():
        write_atomically(Path(runner.work_dir) / name, text.encode())


def _data(runner: Runner, splits: tuple[str, ...]) -> dict[str, Any]:
    return {
        split: described(getattr(runner, f'{split}_dataloader').dataset)
        for split in splits
        if runner.cfg.get(f'{split}_dataloader') is not None
    }


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
    # a pipe, /dev/stdout or what a link names is written where it is
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(content)
    else:
        write_atomically(path, content.encode())


def weights_digest(model: nn.Module) -> str:
    """A digest of a run's model, which all files with the same weights have in common."""
    return digest_of({k: v for k, v in model.state_dict().items() if k != KEY})


def read_numbers(path: str, model: nn.Module, checkpoint: Path) -> dict[str, float]:
    """The scores of a model that `write_numbers` has written."""
    try:
        values = json.loads(Path(path).read_text())
        tested = values.pop(WEIGHTS, None)
    except (OSError, ValueError, AttributeError, TypeError) as error:  # of other JSON, or none
        raise ValueError(f'numbers={path!r} cannot be read: {error}') from error
    own = weights_digest(model)
    allowed = f'scores of {checkpoint.name}, whose weights are {own}, and these are of {tested}'
    check(tested == own, 'numbers', path, allowed)
    for name, value in values.items():
        check_type(f'numbers: {name}', float, value)
    return values


FILE = 'routing.jsonl'
# So many of its entries stand for a part of a layer: the experts of a ViT-B are a gigabyte, and of
# 16,384 entries drawn at random a norm is known to about a percent.
SAMPLED = 16_384


@LOG_PROCESSORS.register_module()
class MoeLogProcessor(LogProcessor):
    """Sums losses over layers in the lines of text, and fetches statistics of single layers.

    These go to TensorBoard and the JSON log at every logged iteration, as averages since the last.
    """

    def get_log_after_iter(self, runner: Any, batch_idx: int, mode: str) -> tuple[dict, str]:
        """As mmengine's, but for each `<layer>/<name>_loss` one `moe/<name>_loss` in the text."""
        scalars, text = super().get_log_after_iter(runner, batch_idx, mode)
        sums: dict[str, float] = {}
        layers = moe_layers(getattr(unwrapped(runner), 'routed_model', nn.Identity()))
        for name, value in scalars.items():
            name = name.removeprefix(f'{mode}/')  # which a config may ask for
            layer, _, kind = name.rpartition('/')
            if layer in layers:  # a model may have names with a slash of its own
                text = re.sub(rf'  {re.escape(name)}: \S+', '', text)
                if kind.endswith('_loss'):
                    sums[kind] = sums.get(kind, 0.0) + value
        statistics = getattr(unwrapped(runner), 'logged_statistics', None)
        if mode == 'train' and statistics is not None:
            summary = statistics.summary()
            statistics.reset()
            scalars |= summary
            if left_out := sum(v for n, v in summary.items() if n.endswith('/nonfinite_tokens')):
                sums['nonfinite_tokens'] = left_out
        text += ''.join(f'  moe/{kind}: {value:.4f}' for kind, value in sums.items())
        return scalars, text


@HOOKS.register_module()
class RoutingHistoryHook(Hook):
    """Writes `routing.jsonl` into the work dir while a model trains.

    A line is a JSON object: `iteration`, and in `layers`, by name, the mean of each share (`load`
    (E,), `code_usage` (M,)) since the line before, and `change`, `|new - old| / |new|` of the
    weights by part of the layer, estimated from `SAMPLED` entries of a tensor. A resumed run
    replaces what lies behind its checkpoint. The hook draws from a generator of its own.

    Args:
        records: How many lines a whole run gives, at least 1.
    """

    priority = 'LOW'  # codebooks have moved by then, and the checkpoint is not yet written

    def __init__(self, records: int = 100) -> None:
        check_type('records', int, records)
        check(records >= 1, 'records', records, 'at least 1')
        self.records = records
        self._resumed: dict[str, Any] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Goes on from the last line of a run that is resumed."""
        if runner._resume:
            self._resumed = checkpoint.get('routing_history')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Leaves in the checkpoint what the next line is made from."""
        statistics = unwrapped(runner).recorded_statistics
        # of this rank: others may not be asked here
        kept = {'statistics': statistics.state_dict(), 'weights': self._before}
        checkpoint['routing_history'] = kept

    def before_train(self, runner: Runner) -> None:
        """Starts the file, or cuts it where a resumed run goes on."""
        model = unwrapped(runner)
        self._layers = moe_layers(model.routed_model)
        model.recorded_statistics = RoutingStatistics()
        self._before = {name: _sample(layer) for name, layer in self._layers.items()}
        if self._resumed is not None:
            device = next(model.parameters()).device
            model.recorded_statistics.load_state_dict(self._resumed['statistics'], device)
            self._before = self._resumed['weights']
        if is_main_process():
            path = Path(runner.work_dir) / FILE
            lines = read_history(path) if runner._resume and path.exists() else []
            kept = [json.dumps(line) + '\n' for line in lines if line['iteration'] <= runner.iter]
            write_atomically(path, ''.join(kept).encode())

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Writes a line when one is due."""
        done = runner.iter + 1
        if done % max(runner.max_iters // self.records, 1):
            return
        statistics = unwrapped(runner).recorded_statistics
        layers = {name: dict[str, Any]() for name in self._layers}
        for name, share in statistics.means().items():
            layer, _, kind = name.rpartition('/')
            if share.ndim:
                layers[layer][kind] = [round(value, 6) for value in share.tolist()]
        statistics.reset()
        for name, layer in self._layers.items():
            now = _sample(layer)
            layers[name]['change'] = _change(self._before[name], now)
            self._before[name] = now
        if is_main_process():
            with (Path(runner.work_dir) / FILE).open('a') as file:
                file.write(json.dumps({'iteration': done, 'layers': layers}) + '\n')


def read_history(path: Path) -> list[dict[str, Any]]:
    """Reads the lines that `RoutingHistoryHook` wrote, oldest first."""
    *lines, _ = path.read_bytes().split(b'\n')
    return [json.loads(line) for line in lines]


def _sample(layer: MoeLayer) -> dict[str, Tensor]:
    """By part of a layer: its weights (at most `SAMPLED` of a tensor), on the CPU."""
    codebooks = {f'{name}.': m for name, m in layer.named_modules() if isinstance(m, Codebook)}
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in layer.named_parameters():
        if not name.startswith((*codebooks,)):
            parts.setdefault(name.partition('.')[0], []).append(whole(parameter.detach()))
    with torch.no_grad():
        for codebook in codebooks.values():
            # not its parameters: some codebooks have none, some make their codes from two
            parts.setdefault('codebook', []).append(codebook.codes())
    return {name: torch.cat([_picked(t) for t in tensors]) for name, tensors in parts.items()}


def _picked(weights: Tensor) -> Tensor:
    """The weights, or the same random ones of them every time, scaled to the norm of all."""
    flat = weights.reshape(-1)
    if len(flat) <= SAMPLED:
        return flat.float().cpu().clone()
    own = torch.Generator().manual_seed(0)  # training draws from the global one
    picked = flat[torch.randint(len(flat), (SAMPLED,), generator=own).to(flat.device)]
    return picked.float().cpu() * (len(flat) / SAMPLED) ** 0.5


def _change(before: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, float]:
    """|new - old| / |new| by part; zero weights that have not moved give 0."""
    shares = {
        name: (new - before[name].to(new.device)).norm() / new.norm().clamp(min=1e-12)
        for name, new in now.items()
    }
    return {name: float(f'{share.item():.4g}') for name, share in shares.items()}
