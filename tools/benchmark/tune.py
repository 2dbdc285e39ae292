"""`benchmark.py tune`: the measured constants of the CPU kernel, each varied around its value.

A constant is varied alone, in the cells where it matters. All its values run interleaved, as the
contenders of `moe` do, and each is first compared with the plain loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vqmoe_vision.moe.config import check
from vqmoe_vision.moe.kernels import cpu, make_plan

from . import ours
from .cells import Cell, Settings
from .contenders import Contender
from .environment import computes, describe_machine, restart_prepared
from .inputs import Batch, Inputs
from .layers import time_contenders
from .report import table, write

_ALL = cpu._ALL
_FLOAT32 = (Cell(tokens=197), Cell(tokens=197, top_k=2))
_BFLOAT16 = tuple(dataclasses.replace(cell, dtype='bfloat16') for cell in _FLOAT32)
_FEW_ROWS = Cell(tokens=197, batch=1)
_LONG = Cell(tokens=1024, top_k=2, dtype='bfloat16')
_LONGER = Cell(tokens=4096, top_k=2, dtype='bfloat16')
# one group that is a tenth or a fifth longer: what evening by AMX may just add, and just not
_UNEVEN = tuple(Cell(tokens=1024, dtype='bfloat16', skew=skew) for skew in (1.1, 1.2))
_COLUMNS = {
    'contender': '{:<28}',
    'median_ms': '{:>10.2f}',
    'min_ms': '{:>10.2f}',
    'to_chosen': '{:>10.3f}',
    'low': '{:>7.3f}',
    'high': '{:>7.3f}',
    'to_bound': '{:>9.2f}',
    'peak_mb': '{:>9.1f}',
}


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A measured constant of `kernels/cpu.py`, and where it decides something."""

    values: tuple[Any, ...]
    cells: tuple[Cell, ...]
    amx: bool | None = None
    threads: str | None = None

    def absent(self, cell: Cell, threads: int) -> str | None:
        """Why it decides nothing here; None if it does."""
        if self.threads is not None and (threads > 1) != (self.threads == 'several'):
            return f'needs --threads {"1" if threads > 1 else "2 or more"}'
        if cell.dtype == 'float32':  # AMX has no product of it
            return None
        if self.amx is not None and self.amx != cpu._HAS_AMX:
            return f'of processors with{"" if self.amx else "out"} AMX'
        return None if computes(cell.dtype) else 'the processor has no instructions for it'


_WITHOUT_AMX: dict[str, Any] = {'amx': False, 'threads': 'several'}
CONSTANTS = {
    '_BLOCK': Constant(values=(2, 4, 8, 16), cells=_BFLOAT16, amx=False),
    '_AMX_BLOCK': Constant(values=(16, 32, 64), cells=_BFLOAT16, amx=True),
    '_MOST_BLOCKS': Constant(values=(32, 64, 128, 256), cells=(_LONG, _LONGER)),
    '_RUNS': Constant(
        values=((), (2,), (_ALL,), (_ALL, 2), (_ALL, 4, 2)), cells=_FLOAT32, threads='several'
    ),
    '_LOW_RUNS': Constant(values=((), (2,), (4, 2), (_ALL, 2)), cells=_BFLOAT16, **_WITHOUT_AMX),
    '_AMX_RUNS': Constant(values=((), (2,), (_ALL,), (_ALL, 2)), cells=_BFLOAT16, amx=True),
    '_SPARE': Constant(values=(0, 16, 32, 64), cells=(*_FLOAT32, *_BFLOAT16), **_WITHOUT_AMX),
    '_SPARE_ALONE': Constant(
        values=(0, 16, 32, 64), cells=(*_FLOAT32, *_BFLOAT16), amx=False, threads='one'
    ),
    '_AMX_SPARE': Constant(values=(0, 25, 50, 100), cells=(*_BFLOAT16, *_UNEVEN), amx=True),
    '_AMX_SHARE': Constant(values=(6, 12, 24), cells=_UNEVEN, amx=True, threads='several'),
    '_MOST_SPARE': Constant(values=(2, 4, 8, 16), cells=(_FEW_ROWS,), threads='several'),
}


@contextmanager
def changed(name: str, value: Any) -> Iterator[None]:
    """A constant has another value inside the block, in all threads."""
    before = getattr(cpu, name)
    setattr(cpu, name, value)
    try:
        yield
    finally:
        setattr(cpu, name, before)


def deciding(name: str, cell: Cell, settings: Settings) -> list[Any]:
    """Values with which the rows of some round stand otherwise than with the one in use."""
    inputs, own = Inputs(cell, settings.device), getattr(cpu, name)
    routings = [inputs.batch(i).indices.flatten() for i in range(settings.repeats)]

    def ends(value: Any) -> list[list[int]]:
        with changed(name, value):
            plans = [make_plan(r, cell.experts, cell.compute_dtype) for r in routings]
        return [plan.offsets.tolist() for plan in plans]

    in_use = ends(own)
    return [v for v in CONSTANTS[name].values if v != own and ends(v) != in_use]


def measure_constant(
    name: str, cell: Cell, settings: Settings, values: Sequence[Any]
) -> list[dict[str, Any]]:
    """Time the dispatch and experts of one cell with its own value of a constant and others."""
    inputs = Inputs(cell, settings.device)
    torch.manual_seed(0)
    (dense,), (bound,) = ours.dense(cell, settings, inputs), ours.bound(cell, settings, inputs)
    (chosen,) = ours.ours(cell, settings, inputs)
    contenders = {'dense': dense, 'bound': bound}
    for value in (getattr(cpu, name), *values):
        contender = with_value(chosen, name, value)
        contenders[contender.name] = contender
    rows = time_contenders(contenders, {}, inputs, settings)
    own = _label(name, getattr(cpu, name))
    reference = next(row for row in rows if row['contender'] == own)
    for row in rows:
        pairs = zip(row['times_ms'], reference['times_ms'], strict=True)
        row['constant'], row['chosen'] = name, row is reference
        row['to_chosen'] = row['median_ms'] / reference['median_ms']
        row['low'], row['high'] = _quartiles([mine / its for mine, its in pairs])
    return rows


def with_value(contender: Contender, name: str, value: Any) -> Contender:
    """The same contender, planning its rows with another value of a constant."""
    run = contender.forward

    def forward(module: nn.Module, batch: Batch) -> Sequence[Tensor]:
        with changed(name, value):
            return run(module, batch)

    return dataclasses.replace(contender, name=_label(name, value), forward=forward)


def _label(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        value = f'({", ".join("all" if run == _ALL else str(run) for run in value)})'
    return f'{name} = {value}'


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def run_tune(args: argparse.Namespace, restart: bool) -> None:
    """Measures constants and prints a table for each cell."""
    names = args.constants or list(CONSTANTS)
    for name in names:
        check(name in CONSTANTS, '--constants', name, f'one of {", ".join(CONSTANTS)}')
    clock = args.clock or ('process' if args.threads == 1 else 'wall')
    settings = Settings(threads=args.threads, clock=clock, repeats=args.repeats)
    if restart:
        restart_prepared(settings.threads)
    torch.set_num_threads(settings.threads)
    run: dict[str, Any] = {'command': 'tune', 'header': describe_machine(settings.device)}
    run |= {'settings': vars(settings), 'rows': [], 'skipped': {}}
    for key, value in {**run['header'], **run['settings']}.items():
        print(f'{key}: {value}')
    for name in names:
        for cell in CONSTANTS[name].cells:
            if reason := CONSTANTS[name].absent(cell, settings.threads):
                run['skipped'][f'{name} in {cell.dtype}'] = reason
                continue
            value = getattr(cpu, name)
            own, others = _label(name, value), deciding(name, cell, settings)
            for same in CONSTANTS[name].values:
                if same not in (value, *others):
                    why = 'rows stand as with the value in use'
                    run['skipped'][f'{_label(name, same)} in {cell}'] = why
            if not others:
                continue
            rows = measure_constant(name, cell, settings, others)
            print(f'\n{cell}: chosen is {own}', table(rows, _COLUMNS), sep='\n', flush=True)
            run['rows'] += rows
    print('', *(f'{name}: not run, {why}' for name, why in run['skipped'].items()), sep='\n')
    if args.out is not None:
        write(args.out, run)
