"""`benchmark.py gpu`: whether kernels compute right on a card, in every dtype and case."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from vqmoe_vision.moe import use_kernel
from vqmoe_vision.moe.kernels import KERNELS

from .cells import DTYPES, Cell, Settings
from .gpu_card import spoil_memory
from .gpu_stages import outcome
from .inputs import Batch, Inputs
from .oracle import check_against_oracle
from .ours import experts_grouped, experts_loop, ours

KERNEL_CELL = Cell(tokens=197, batch=2, width=384, top_k=2)


def check_kernels(settings: Settings, cell: Cell = KERNEL_CELL) -> list[dict[str, Any]]:
    """Every kernel in every dtype and case, in outputs and gradients."""
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
            spoil_memory(settings.device)
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
