"""`benchmark.py gpu`: whether a card computes right, what it waits for, and how fast it is.

Kernels are compared with plain loops in every dtype. Training steps of every method, classifying
and segmenting, run with every wait for the host forbidden. Then layers and whole networks are
timed. The result is one row, which can be sent in.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import count, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import vqmoe_vision
from vqmoe_vision.moe import METHODS, use_kernel
from vqmoe_vision.moe.kernels import KERNELS

from .cells import DTYPES, Cell, Settings
from .inputs import Batch, Inputs
from .networks import Comparison, Network
from .oracle import check_against_oracle
from .ours import experts_grouped, experts_loop, ours
from .report import write
from .training import Finished, running, settings_of

KERNEL_CELL = Cell(tokens=197, batch=2, width=384, top_k=2)
PACKAGE = Path(vqmoe_vision.__file__).parent
ROOT = Path(__file__).parents[2]
# a small config of each task, whose data come with a library
CONFIGS = {
    'classification': 'configs/classification/digits/demo/vit_tiny_vqmoe_demo.py',
    'segmentation': 'configs/segmentation/digit_scenes/segmenter_vit_tiny_vqmoe_digit_scenes.py',
}
SMALL_DATA = ('train_dataloader.dataset.num_scenes=512',)  # else clusters of 20,000 are sought
STEPS = 4  # of which the first two may wait: an optimizer makes its state


def check_kernels(settings: Settings, cell: Cell = KERNEL_CELL) -> list[dict[str, Any]]:
    """Every kernel in every dtype and case, in outputs and gradients.

    Args:
        settings: The device.
        cell: Shape of the layer.

    Returns:
        A row each: `kernel`, `dtype`, `case`, as `result` 'equal', or why it is not or does not
        run, and `ok`, whether nothing is wrong.
    """
    rows: list[dict[str, Any]] = []
    for shaped in _in_every_dtype(cell):
        with outcome('built', kernel='all', dtype=_dtype_of(shaped), case='all') as building:
            rows += _rows_of_kernels(shaped, settings)
        if not building['ok']:
            rows.append(building)
    return rows


def _in_every_dtype(cell: Cell) -> list[Cell]:
    """Without autocast, and with that of both low dtypes."""
    plain = [replace(cell, dtype=dtype, amp=False) for dtype in DTYPES]
    return plain + [replace(cell, dtype=dtype, amp=True) for dtype in ('bfloat16', 'float16')]


def _dtype_of(cell: Cell) -> str:
    return f'{cell.dtype} amp' if cell.amp else cell.dtype


def _rows_of_kernels(cell: Cell, settings: Settings) -> list[dict[str, Any]]:
    rows, inputs = [], Inputs(cell, settings.device)
    (contender,) = ours(cell, settings, inputs)
    for (case, change), kernel in product(CASES.items(), KERNELS):
        with outcome('equal', kernel=kernel, dtype=_dtype_of(cell), case=case) as row:
            try:
                batch, kept = change(inputs.batch(0))
                contender.forward = partial(experts_grouped, kept=kept)
                contender.oracle = partial(experts_loop, kept=kept)
                with use_kernel(kernel):
                    check_against_oracle(contender, batch, cell, settings)
            except ValueError as reason:
                # a kernel that does not take a dtype says so, and is not wrong
                if not str(reason).startswith(f'kernel={kernel!r} is not possible'):
                    raise
                row['result'] = str(reason)
        rows.append(row)
    return rows


# a batch, and which of its assignments are computed; None for all
Case = tuple[Batch, Tensor | None]


def _without_some_experts(batch: Batch) -> Case:
    """The first expert, one between others and the last get no rows; there are eight."""
    empty = torch.tensor([0, 4, 7], device=batch.indices.device)
    indices = batch.indices.masked_fill(torch.isin(batch.indices, empty), 1)
    return replace(batch, indices=indices), None


def _with_dropped(batch: Batch, every: int) -> Case:
    """One assignment in `every` is not computed."""
    numbers = torch.arange(batch.indices.numel(), device=batch.indices.device)
    return batch, (numbers % every > 0).view_as(batch.indices)


def _without_tokens(batch: Batch) -> Case:
    x, weights = (t.detach()[:0].requires_grad_() for t in (batch.x, batch.weights))
    return replace(batch, x=x, weights=weights, indices=batch.indices[:0]), None


# what a routing may bring, from a batch that has none of it
CASES: dict[str, Callable[[Batch], Case]] = {
    'every expert has rows': lambda batch: (batch, None),
    'experts without rows': _without_some_experts,
    'dropped rows': partial(_with_dropped, every=3),
    'all rows dropped': partial(_with_dropped, every=1),
    'no rows': _without_tokens,
}


@contextmanager
def waiting_forbidden(device: str) -> Iterator[None]:
    """Makes whatever waits for a card an error. Other devices have nothing to wait for."""
    if not device.startswith('cuda'):
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check_methods(
    settings: Settings, sizes: Mapping[str, Any] | None = None, img_size: int = 224
) -> list[dict[str, Any]]:
    """Training steps of every method and of a dense model, in bfloat16.

    Args:
        settings: The device.
        sizes: Options of all models, such as `depth`; None for theirs.
        img_size: Side in pixels.

    Returns:
        A row each: `step`, the model; as `result` that it waits for nothing, or what for; `ok`.
    """
    options = [f'{name}={value}' for name, value in (sizes or {}).items()]
    specs = [f'vit_tiny_{method}' for method in METHODS] + ['vit_tiny_patch16_224']
    specs = [','.join([spec, *options]) for spec in specs]
    comparison = Comparison(
        models=tuple(specs), img_size=img_size, dtype='bfloat16', amp=True, modes=('training',)
    )
    build = partial(_step_of, comparison=comparison, settings=settings)
    return [_row(spec, partial(build, spec), settings) for spec in specs]


def _step_of(spec: str, comparison: Comparison, settings: Settings) -> Callable[[int], None]:
    """Forward, backward, clipping and optimizer of one model."""
    network = Network(spec, comparison, settings, False)
    network.model.train()

    def step(index: int) -> None:
        network.forward(index).backward()
        clip_grad_norm_(network.model.parameters(), 1.0)
        network.update()

    return step


def check_configs(settings: Settings) -> list[dict[str, Any]]:
    """Iterations of a config of each task with all hooks, as `check_methods`.

    That of segmentation runs with every method: `check_methods` classifies.
    """
    rows = [_config_row('classification', [], settings)]
    for method in METHODS:
        options = [f'model.backbone.model_name=vit_tiny_{method}', *SMALL_DATA]
        rows.append(_config_row('segmentation', options, settings, METHODS[method].needs_features))
    return rows


def _config_row(
    task: str, options: Sequence[str], settings: Settings, needs_features: bool = False
) -> dict[str, Any]:
    step = ' '.join([f'{task}: {CONFIGS[task]}', *options])
    with TemporaryDirectory() as folder, outcome(_nothing(settings.device), step=step) as row:
        from vqmoe_vision.engine.cli import use_amp

        config = settings_of(str(ROOT / CONFIGS[task]), options)
        if needs_features:
            config.model.backbone.features = _untrained(config, Path(folder) / 'dense.pth')
        use_amp(config)
        with running(config) as runner:
            runner.train_loop.run_iter = _watched(runner.train_loop.run_iter, settings.device)
            runner.train()
    return row


def _untrained(config: Any, file: Path) -> str:
    """Saves a dense network of the backbone's shape, by which a method may read images."""
    backbone = config.model.backbone
    shape = {
        name: backbone[name]
        for name in ('img_size', 'patch_size', 'depth', 'embed_dim', 'num_heads', 'class_token')
    }
    torch.save(
        timm.create_model('vit_tiny_patch16_224', **shape, global_pool='').state_dict(), file
    )
    return str(file)


def _row(
    spec: str, build: Callable[[], Callable[[int], None]], settings: Settings
) -> dict[str, Any]:
    with outcome(_nothing(settings.device), step=spec) as row, suppress(Finished):
        watched = _watched(build(), settings.device)
        for index in count():
            watched(index)
    return row


def _watched(step: Callable[..., None], device: str) -> Callable[..., None]:
    """A step that may wait in the first half of `STEPS`, and then not, and ends after them."""
    numbers = count(1)

    def watched(*args: Any, **kwargs: Any) -> None:
        number = next(numbers)
        with waiting_forbidden(device) if number > STEPS // 2 else nullcontext():
            step(*args, **kwargs)
        if number == STEPS:
            raise Finished

    return watched


def run_stages(
    run: dict[str, Any], stages: Mapping[str, Callable[[], list[dict[str, Any]]]], out: Path
) -> None:
    """Runs what a run consists of, and saves it after each, whatever becomes of the next.

    Args:
        run: Gets the rows of each stage by its name, and as `failed` those that are not `ok`, with
            a row for a stage that did not end.
        stages: Checks, and what times and prints.
        out: The JSON file.
    """
    run['failed'] = []
    for name, stage in stages.items():
        run[name] = []
        with outcome('done', step=name) as done:
            run[name] = stage()
        checked = [row for row in run[name] if 'ok' in row]
        for row in checked:
            print(*row.values(), sep='  ', flush=True)
        run['failed'] += [row for row in (*checked, done) if not row['ok']]
        write(out, run)


def _nothing(device: str) -> str:
    return 'waits for nothing' if device.startswith('cuda') else f'runs; {device} has no waits'


@contextmanager
def outcome(good: str, **names: str) -> Iterator[dict[str, Any]]:
    """The row of what runs inside the block: any error is a result, and what follows runs too.

    Args:
        good: The result without an error.
        **names: Begin the row.
    """
    row: dict[str, Any] = {**names, 'result': good, 'ok': True}
    try:
        yield row
    except Exception as error:
        text = str(error).strip().partition('\n')[0]
        row.update(result=f'{type(error).__name__}: {text} ({_place(error)})', ok=False)


def _place(error: Exception) -> str:
    """File and line of this package that an error went through last, or of where it began."""
    steps = traceback.walk_tb(error.__traceback__)
    places = [(Path(frame.f_code.co_filename), line) for frame, line in steps]
    own = [place for place in places if place[0].is_relative_to(PACKAGE)]
    file, line = (own or places)[-1]
    return f'{file.relative_to(PACKAGE.parent) if own else file.name}:{line}'
