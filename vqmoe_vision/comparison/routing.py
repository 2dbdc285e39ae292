"""What the routing of finished runs is like, kept in their rows.

docs/routing-measures.md defines the measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from vqmoe_vision.analysis.checkpoints import convergence, routing_changes
from vqmoe_vision.analysis.measures import kept_beyond_chance
from vqmoe_vision.analysis.source import images_of, source_of
from vqmoe_vision.analysis.survey import survey
from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.checkpoint_files import candidates, last_checkpoint
from vqmoe_vision.engine.trained import load_trained
from vqmoe_vision.moe import moe_layers

from .cells import spread
from .results import Results, rounded
from .runs import Run
from .spec import Comparison
from .store import Store

NUM_IMAGES = 1000  # of the test
SHIFTED_IMAGES = 100
SEVERITY = 3
_BATCH = 50


def measure_routing(runs: Sequence[Run], store: Store) -> list[str]:
    """Surveys finished runs that have no such numbers yet; returns those without a checkpoint."""
    usable, present, absent = store.with_checkpoints(runs)
    for run in tqdm(present, unit='run'):
        if 'routing' not in usable[run.row, run.seed]:
            store.add(run, routing=_routing(run))
    return absent


def _routing(run: Run) -> dict[str, Any]:
    """Numbers by layer, changes by shift and by checkpoint, convergence; {} of a dense model."""
    config, last = run.config(), last_checkpoint(run.folder)
    model = load_trained(config, str(last))
    layers = moe_layers(model.routed_model)
    if not layers:
        return {}
    from vqmoe_vision.analysis.corruptions import all_shifts  # with numba, in extra `analyze`

    source = source_of(model, config, NUM_IMAGES)
    seen = survey(
        model.routed_model,
        source.batches(_BATCH),
        title=run.name,
        normalization=source.normalization,
        classes=source.classes,
        shifts=all_shifts((SEVERITY,)),
        shifted_images=SHIFTED_IMAGES,
    )
    files = sorted(candidates(run.folder), key=_iteration)
    # each is read once
    models = [model if path == last else load_trained(config, str(path)) for path in files]
    prefix = next(n for n, module in model.named_modules() if module is model.routed_model)
    names = [f'{prefix}.{name}' if prefix else name for name in layers]
    states = [each.state_dict() for each in models]
    found = {
        'images': seen.images,
        'layers': {name: layer.numbers for name, layer in seen.layers.items()},
        'shifts': seen.shifts,
        'checkpoints': [path.stem for path in files],
        'changes': [
            routing_changes(a.routed_model, b.routed_model, map(images_of, source.batches(_BATCH)))
            for a, b in pairwise(models)
        ],
        'convergence': convergence(states, names) if len(files) > 1 else {},
    }
    return rounded(found)


def _iteration(path: Path) -> int:
    content = read_content(str(path), verify=False)  # which is done when its weights are loaded
    return content['meta']['iter']


def routing_table(comparison: Comparison, results: Results) -> pd.DataFrame:
    """Measures as means over layers, with the standard deviation over seeds; a line per decider."""
    lines = []
    for (row, _), content in results.usable.items():
        for decider, numbers in by_decider(content.get('routing') or {'layers': {}}).items():
            lines.append({'row': row, 'decider': decider, **numbers})
    if not lines:
        return pd.DataFrame()
    frame = pd.DataFrame(lines)
    order = {row: number for number, row in enumerate(comparison.rows)}
    groups = frame.sort_values('row', key=lambda rows: rows.map(order), kind='stable')
    shown = []
    for (row, decider), group in groups.groupby(['row', 'decider'], sort=False):
        values = group.drop(columns=['row', 'decider'])
        spreads = {name: spread(values[name].mean(), values[name].std()) for name in values}
        shown.append({'row': row, 'decider': decider, 'seeds': str(len(group)), **spreads})
    return pd.DataFrame(shown)


def routed_images(results: Results) -> str:
    """On how many images the routing of runs was looked at, as a sentence says it."""
    routed = (content['routing'] for content in results.usable.values() if content.get('routing'))
    return ' or '.join(map(str, sorted({routing['images'] for routing in routed})))


def by_decider(routing: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What the table says of each decider of a run; means over layers."""
    deciders = dict.fromkeys(
        name.rpartition('/')[0]
        for numbers in routing['layers'].values()
        for name in numbers
        if '/' in name
    )
    return {decider: _numbers(decider, routing) for decider in deciders}


def kept(routing: dict[str, Any], decider: str, changes: dict[str, float]) -> float:
    """Share of tokens whose expert stays, beyond chance of the last load; mean over layers."""
    found = [
        kept_beyond_chance(changes[f'{name}.{decider}'], numbers[f'{decider}/changed_by_chance'])
        for name, numbers in routing['layers'].items()
        if f'{name}.{decider}' in changes and numbers[f'{decider}/changed_by_chance'] > 0
    ]
    return float(np.mean(found)) if found else math.nan


def _numbers(decider: str, routing: dict[str, Any]) -> dict[str, float]:
    def mean(name: str) -> float:
        found = [layer[name] for layer in routing['layers'].values() if name in layer]
        return float(np.mean(found)) if found else math.nan

    shifts, changes = routing['shifts'], routing['changes']
    corrupted = [n for n in shifts if n.endswith(f' {SEVERITY}')]
    return {
        'load entropy': mean(f'{decider}/load_entropy'),
        'information on the class': mean(f'{decider}/normalized_mutual_information'),
        'effective rank, before': mean('effective_rank_before'),
        'after': mean('effective_rank_after'),
        'similarity of answers': mean('similarity_outputs'),
        'kept since the checkpoint before': kept(routing, decider, changes[-1])
        if changes
        else math.nan,
        'kept when mirrored': kept(routing, decider, shifts['flip']),
        'kept when corrupted': float(
            np.mean([kept(routing, decider, shifts[n]) for n in corrupted])
        ),
    }
