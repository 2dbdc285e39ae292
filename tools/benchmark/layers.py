"""`benchmark.py moe`: one layer, all contenders side by side."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from vqmoe_vision.moe.config import check
from vqmoe_vision.provenance import installed

from . import methods, ours, peers
from .cells import Cell, Settings
from .contenders import Contender, Forward, UnsuitableError, needs
from .inputs import Batch, Inputs
from .oracle import check_against_oracle
from .report import layer_table
from .timing import Clock, interleave, ratio

Build = Callable[[Cell, Settings, Inputs], list[Contender]]


def _whole_layer(name: str, cell: Cell, settings: Settings, inputs: Inputs) -> list[Contender]:
    return [methods.whole_layer(name, methods.LAYERS[name], cell, settings, inputs)]


def _experts_only(name: str, cell: Cell, settings: Settings, inputs: Inputs) -> list[Contender]:
    (layer,) = _whole_layer(name, cell, settings, inputs)
    return [methods.experts_only(layer, cell)]


# the two that everything is compared with
FLOORS: dict[str, Build] = {'dense': ours.dense, 'bound': ours.bound}
OURS: dict[str, Build] = {
    'loop': ours.loop,
    'ours': ours.ours,
    **{name: partial(_whole_layer, name) for name in methods.LAYERS},
    **{f'experts_only:{name}': partial(_experts_only, name) for name in methods.LAYERS},
}
# by the name of their package
PEERS: dict[str, Build] = {
    'soft-moe': peers.soft_moe,
    'soft-moe-pytorch': peers.soft_moe_pytorch,
    'st-moe-pytorch': peers.st_moe_pytorch,
    'mixture-of-experts': peers.mixture_of_experts,
    'transformers': peers.transformers,
    'moe-jetpack': peers.moe_jetpack,
}
CONTENDERS = {**FLOORS, **OURS, **PEERS}
REFERENCES = ('moe-jetpack',)  # peers that are written here: nothing to install
COMPILED = ('dense', 'ours', *methods.LAYERS)
CHECK_ROUND = 10**6  # a batch that is not timed


def choose(names: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the contenders of a run, the floors always among them."""
    if names is None:
        return tuple(name for name in CONTENDERS if _available(name))
    for name in names:
        check(name in CONTENDERS, 'contenders', name, f'one of {sorted(CONTENDERS)}')
        reason = "it is not installed: pip install '.[bench]'"
        check(_available(name), 'contenders', name, reason)
    return tuple(dict.fromkeys([*FLOORS, *names]))


def _available(name: str) -> bool:
    return name not in PEERS or name in REFERENCES or installed(name) is not None


def run_layers(
    runs: Sequence[tuple[Cell, Sequence[str] | None]], settings: Settings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measures and prints cells; rows, and by cell why some are absent."""
    rows, skipped = [], []
    for cell, names in runs:
        measured, absent = measure_layer(cell, settings, choose(names))
        print(layer_table(str(cell), measured, absent), flush=True)
        rows += measured
        skipped.append({'cell': vars(cell), 'reasons': absent})
    return rows, skipped


def measure_layer(
    cell: Cell, settings: Settings, names: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Time all contenders in one cell: their rows, and why some are absent."""
    inputs = Inputs(cell, settings.device)
    contenders, skipped = build(cell, settings, names, inputs)
    for contender in contenders.values():
        if contender.oracle is not None:
            given = contender.given(inputs.batch(CHECK_ROUND))
            check_against_oracle(contender, given, cell, settings)
            contender.clear(inputs.batch(CHECK_ROUND))
    tried = try_out(contenders, skipped, inputs, settings)
    times = interleave(_steps(contenders, inputs, settings), settings.repeats)
    flat = {name: parts['step'] for name, parts in times.items()}
    rows = [_row(made, flat, tried[name], cell, settings) for name, made in contenders.items()]
    return rows, skipped


def build(
    cell: Cell, settings: Settings, names: Sequence[str], inputs: Inputs
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Make contenders by name, and say why others cannot be."""
    found: dict[str, Contender] = {}
    skipped: dict[str, str] = {}
    for name in names:
        if cell.skew > 1 and name not in (*FLOORS, 'loop', 'ours'):
            skipped[name] = 'it routes by itself, so its load cannot be set'
            continue
        torch.manual_seed(0)
        try:
            made = CONTENDERS[name](cell, settings, inputs)
        except UnsuitableError as reason:
            skipped[name] = str(reason)
            continue
        except (RuntimeError, TypeError) as error:
            if name not in PEERS:
                raise
            skipped[name] = f'fails: {_first_line(error)}'
            continue
        for contender in made:
            found.setdefault(contender.name, contender)
    if settings.compiled:
        torch._dynamo.reset()  # or the graphs of earlier cells count against its limit
        twins = [compiled(found[name]) for name in COMPILED if name in found]
        found.update({twin.name: twin for twin in twins})
    return found, skipped


def compiled(contender: Contender) -> Contender:
    """The same through torch.compile, without a graph break."""
    torch._inductor.config.fallback_random = True
    forward: Forward
    if contender.forward is ours.experts_grouped:
        forward = torch.compile(ours.experts_grouped, fullgraph=True)
    else:
        call = torch.compile(contender.module, fullgraph=True)
        routed = contender.forward is methods.run_layer
        forward = partial(methods.run_layer if routed else ours.on_tokens, call=call)
    return dataclasses.replace(contender, name=f'{contender.name}+compiled', forward=forward)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition('\n')[0][:120]


def try_out(
    contenders: dict[str, Contender],
    skipped: dict[str, str],
    inputs: Inputs,
    settings: Settings,
) -> dict[str, dict[str, float]]:
    """Run every contender alone, and read what it needs."""
    found = {}
    for name, contender in list(contenders.items()):
        batch = contender.given(inputs.batch(CHECK_ROUND))

        def step(contender: Contender = contender, batch: Batch = batch) -> None:
            contender.clear(batch)
            contender.step(batch, inputs.cell, settings)

        try:
            step()
            contender.clear(batch)
            found[name] = needs(step, settings)
        except (RuntimeError, TypeError) as error:
            if contender.equal_to is None:
                raise
            skipped[name] = f'fails: {_first_line(error)}'
            del contenders[name]
        finally:
            contender.clear(batch)
    return found


def _steps(contenders: dict[str, Contender], inputs: Inputs, settings: Settings) -> dict[str, Any]:
    clock = Clock(settings.clock, settings.device)

    def timed(contender: Contender, index: int) -> dict[str, float]:
        batch = contender.given(inputs.batch(index))
        clock.prepare()
        milliseconds = clock.time(lambda: contender.step(batch, inputs.cell, settings))
        contender.clear(batch)
        return {'step': milliseconds}

    return {name: partial(timed, contender) for name, contender in contenders.items()}


def _row(
    contender: Contender,
    times: dict[str, list[float]],
    needed: dict[str, float],
    cell: Cell,
    settings: Settings,
) -> dict[str, Any]:
    own = times[contender.name]
    passes = 3 if settings.backward else 1  # the backward of a product is two products
    flops = 2 * passes * contender.rows * 2 * cell.width * cell.hidden
    equal = contender.equal_to
    return {
        **vars(cell),
        'mode': 'fwdbwd' if settings.backward else 'fwd',
        'contender': contender.name,
        'tokens_per_expert': cell.num_rows / cell.experts,
        'load': contender.load,
        'median_ms': median(own),
        'min_ms': min(own),
        'times_ms': own,
        'gflops': flops / median(own) / 1e6,
        'to_dense': ratio(own, times['dense']),
        'to_bound': ratio(own, times['bound']),
        **needed,
        'drop_rate': contender.drop_rate,
        'equal_to': equal,
        'ours_to_peer': ratio(times[equal], own) if equal else None,
        'note': contender.note,
    }
