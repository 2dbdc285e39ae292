"""`benchmark.py export`: networks as they leave PyTorch, beside themselves and a dense one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from torch import Tensor

from vqmoe_vision.contrib.int8 import export_int8, quantize_int8
from vqmoe_vision.models.export import Exportable, export_onnx, save_program
from vqmoe_vision.models.exported import load_exported
from vqmoe_vision.moe import METHODS, collect_losses
from vqmoe_vision.moe.config import check

from .cells import Cell
from .methods import matched_options
from .networks import parse_model
from .timing import Clock, interleave, median, ratio

WAYS = ('eager', 'compiled', 'program', 'onnxruntime', 'int8', 'onnxruntime-int8')
_IMAGES = 4  # different batches, cycled
_MOE = 'num_experts=8,moe_layers=last2'
BASELINE = 'vit_tiny_patch16_224'


def default_models() -> list[str]:
    """ViT-Ti of every method with the compute of two experts, and what VQMoE is in the end."""
    names = []
    for method in METHODS:
        options = matched_options(method, Cell(tokens=197, experts=8, top_k=2))
        own = [f'{key}={value}' for key, value in options.items() if key != 'num_experts']
        names.append(','.join([f'vit_tiny_{method}', _MOE, *own]))
    return [*names, f'vit_tiny_vqmoe,{_MOE},form=discrete']


@dataclass(frozen=True, kw_only=True)
class Exports:
    """What runs side by side, on one thread."""

    models: Sequence[str]
    baseline: str = BASELINE
    batches: Sequence[int] = (1, 8)
    ways: Sequence[str] = WAYS
    repeats: int = 11

    def __post_init__(self) -> None:
        check(min(self.batches) >= 1, '--batch', self.batches, 'at least 1')
        check(self.repeats >= 1, '--repeats', self.repeats, 'at least 1')


Call = Callable[[Tensor], Tensor]


def measure_exports(exports: Exports) -> list[dict[str, Any]]:
    """Exports networks and times them side by side by the processor's clock."""
    rows, calls, images = [], {}, {}
    specs = dict.fromkeys([exports.baseline, *exports.models])
    torch._dynamo.reset()
    # networks of one class share it, and each has a graph for the first batch and one for others
    torch._dynamo.config.recompile_limit = 4 * len(specs)
    for spec in specs:
        with TemporaryDirectory() as folder:
            model, made = _ways(spec, exports.ways, Path(folder))
        eager = made['eager'][0]
        size = Exportable.of(model).input_size
        images[spec] = {
            batch: [torch.randn(batch, *size) for _ in range(_IMAGES)] for batch in exports.batches
        }
        for way, (call, file_bytes) in made.items():
            # one batch after the other, which also compiles before anything is timed
            every = [x for several in images[spec].values() for x in several]
            pairs = [(call(x), eager(x)) for x in every]
            found, expected = (torch.cat(logits) for logits in zip(*pairs, strict=True))
            calls[spec, way] = call
            rows.append(
                {
                    'contender': spec,
                    'way': way,
                    'difference': (found - expected).abs().max().item(),
                    'equal': (found.argmax(1) == expected.argmax(1)).double().mean().item(),
                    'file_bytes': file_bytes,
                }
            )
        print(f'exported {spec}', flush=True)
    for batch in exports.batches:
        _time(rows, calls, images, batch, exports)
    return rows


def _ways(
    spec: str, ways: Sequence[str], folder: Path
) -> tuple[torch.nn.Module, dict[str, tuple[Call, int | None]]]:
    """A network as functions, with the sizes of their files."""
    name, options = parse_model(spec)
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **options)
    with torch.no_grad(), collect_losses(model):  # codebooks start from tokens
        model.train()(Exportable.of(model).images(8))
    model.eval()
    found: dict[str, tuple[Call, int | None]] = {'eager': (torch.no_grad()(model), None)}
    if 'compiled' in ways:
        found['compiled'] = (torch.no_grad()(torch.compile(model, fullgraph=True)), None)
    if 'int8' in ways:
        quantized = quantize_int8(copy.deepcopy(model))
        torch.save(quantized.state_dict(), folder / 'int8.pth')
        size = (folder / 'int8.pth').stat().st_size
        found['int8'] = (torch.no_grad()(quantized), size)
    for way, suffix, write in (
        ('program', '.pt2', save_program),
        ('onnxruntime', '.onnx', export_onnx),
        ('onnxruntime-int8', '.onnx', export_int8),
    ):
        if way in ways:
            file = write(model, folder / f'model{suffix}')
            run = load_exported(file, threads=1)
            found[way] = (lambda x, run=run: run(x)[0], file.stat().st_size)  # type: ignore[misc]
    return model, found


def _time(
    rows: list[dict[str, Any]],
    calls: dict[tuple[str, str], Call],
    images: dict[str, dict[int, list[Tensor]]],
    batch: int,
    exports: Exports,
) -> None:
    clock = Clock('process', 'cpu')

    def step(spec: str, call: Call, index: int) -> dict[str, float]:
        x = images[spec][batch][index % _IMAGES]
        return {'step': clock.time(lambda: call(x))}

    steps = {'\n'.join(key): partial(step, key[0], call) for key, call in calls.items()}
    times = {name: parts['step'] for name, parts in interleave(steps, exports.repeats).items()}
    for row in rows:
        own = times[f'{row["contender"]}\n{row["way"]}']
        row[f'ms_{batch}'] = median(own)
        row[f'to_baseline_{batch}'] = ratio(own, times[f'{exports.baseline}\n{row["way"]}'])


def export_columns(batches: Sequence[int]) -> dict[str, str]:
    """Columns of the table of `export`."""
    columns = {
        'contender': '{:<64}',
        'way': '{:<16}',
        'difference': '{:>11.1e}',
        'equal': '{:>6.3f}',
        'file_mb': '{:>8.1f}',
    }
    for batch in batches:
        columns |= {f'ms_{batch}': '{:>8.1f}', f'to_baseline_{batch}': '{:>14.2f}'}
    return columns
