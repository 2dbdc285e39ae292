"""What logs say of the routing: lines that stay readable, and a record each in `routing.jsonl`.

Legend: E experts, M codes.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, LOG_PROCESSORS
from mmengine.runner import LogProcessor, Runner
from torch import Tensor, nn

from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.codebooks import Codebook
from vqmoe_vision.moe.config import check, check_type
from vqmoe_vision.moe.layer import MoeLayer

from .checkpoint_files import write_atomically
from .model import RoutingStatistics, unwrapped
from .sharded import whole

FILE = 'routing.jsonl'
# So many of its entries stand for a part of a layer: the experts of a ViT-B are a gigabyte, and of
# 16,384 entries drawn at random a norm is known to about a percent.
SAMPLED = 16_384
_COLUMNS = 100
# mmengine writes it in front of every message
_PREFIX = len('MM/dd HH:mm:ss - mmengine - INFO - ')


def wrapped(text: str) -> str:
    """A message whose lines fit a terminal of 100 columns; all but the first are indented."""
    lines, room = [''], _COLUMNS - _PREFIX
    for part in re.split(r' {2,}(?!\d)', text.strip()):
        if lines[-1].strip() and len(lines[-1]) + 2 + len(part) > room:
            lines.append('    ' + part)
            room = _COLUMNS
        else:
            lines[-1] += f'  {part}' if lines[-1] else part
    return '\n'.join(lines)


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
        text = re.sub(r'base_lr: (\S+) (lr: \1)(?=\s)', r'\2', text)
        statistics = getattr(unwrapped(runner), 'logged_statistics', None)
        if mode == 'train' and statistics is not None:
            summary = statistics.summary()
            statistics.reset()
            scalars |= summary
            if left_out := sum(v for n, v in summary.items() if n.endswith('/nonfinite_tokens')):
                sums['nonfinite_tokens'] = left_out
        text += ''.join(f'  moe/{kind}: {value:.4f}' for kind, value in sums.items())
        return scalars, wrapped(text)

    def get_log_after_epoch(self, *args: Any, **kwargs: Any) -> tuple:
        """As mmengine's; the text is wrapped.

        Args:
            *args: As mmengine's.
            **kwargs: As mmengine's.
        """
        *scalars, text = super().get_log_after_epoch(*args, **kwargs)
        return *scalars, wrapped(text)


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
        checkpoint['routing_history'] = {
            'statistics': statistics.state_dict(),  # of this rank: others may not be asked here
            'weights': self._before,
        }

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

    def after_train_iter(self, runner: Runner, batch_idx: int, *_: Any, **__: Any) -> None:
        """Writes a line when one is due."""
        done = runner.iter + 1
        if done % max(runner.max_iters // self.records, 1):
            return
        statistics = unwrapped(runner).recorded_statistics
        layers: dict[str, dict[str, Any]] = {name: {} for name in self._layers}
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
    moved = {n: (new - before[n].to(new.device)).norm() for n, new in now.items()}
    shares = {n: m / now[n].norm().clamp(min=1e-12) for n, m in moved.items()}
    return {name: float(f'{share.item():.4g}') for name, share in shares.items()}
