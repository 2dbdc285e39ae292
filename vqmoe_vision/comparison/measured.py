"""What was measured of finished runs later: their scores under shifts, and how they route.

Nothing is trained for it: the last checkpoints are tested again, all of them on the same images,
which are read and changed once. docs/routing-measures.md defines the measures of routing.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from tqdm import tqdm

from vqmoe_vision.analysis.checkpoints import convergence, routing_changes
from vqmoe_vision.analysis.measures import kept_beyond_chance
from vqmoe_vision.analysis.source import images_of, source_of
from vqmoe_vision.analysis.survey import survey
from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.checkpoint_files import candidates, last_checkpoint
from vqmoe_vision.engine.trained import load_trained
from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.collect import summarize
from vqmoe_vision.moe.config import check

from .runs import Run
from .spec import Comparison, words_of
from .store import Store, rounded

NUM_IMAGES = 1000  # of the test
SHIFTED_IMAGES = 100
SEVERITY = 3
_BATCH = 50
PLACE = '{corruption}'
_OF_TESTS = ('test_', 'model.')  # all else of a config changes no test
# As imagecorruptions lists them. It is in the extra `analyze`, which whoever makes tables of what
# was measured need not have.
CORRUPTIONS = (
    'gaussian_noise', 'shot_noise', 'impulse_noise', 'defocus_blur', 'glass_blur', 'motion_blur',
    'zoom_blur', 'snow', 'frost', 'fog', 'brightness', 'contrast', 'elastic_transform', 'pixelate',
    'jpeg_compression',
)  # fmt: skip


def expanded(line: str) -> list[str]:
    """The options of each test that a shift stands for: of each corruption, if it names them."""
    names = CORRUPTIONS if PLACE in line else ('',)
    return [line.replace(PLACE, name) for name in names]


def check_shifts(run: Run) -> None:
    """Refuses shifts whose options no config takes, before anything is trained."""
    for name, line in run.comparison.shifts.items():
        words = words_of(f'shifts.{name}', expanded(line)[0])
        try:
            run.merged(*words)
        except ValueError as error:
            raise ValueError(f'shifts.{name}={line!r} is not possible: {error}') from error
        for word in words:
            allowed = "an option of the test, which begins with 'test_' or 'model.'"
            check(word.startswith(_OF_TESTS), f'shifts.{name}', word, allowed)


def shift_scores(comparison: Comparison, content: Mapping[str, Any]) -> dict[str, float]:
    """The score of a row under each shift of which all tests were made as they are written."""
    found = {name: content.get('shifts', {}).get(name, {}) for name in comparison.shifts}
    return {
        name: sum(values.values()) / len(values)
        for name, values in found.items()
        if values.keys() == set(expanded(comparison.shifts[name]))
    }


def measure_shifts(runs: Sequence[Run], store: Store) -> list[str]:
    """Tests finished runs under the shifts that they lack; returns those without a checkpoint."""
    usable, present, absent = store.with_checkpoints(runs)
    for name, line in runs[0].comparison.shifts.items() if runs else ():
        due = [r for r in present if name not in shift_scores(r.comparison, usable[r.row, r.seed])]
        if not due:
            continue
        tests = expanded(line)
        # one model for all of them: they differ in the corruption alone
        models = [_load(run, tests[0]) for run in due]
        found: dict[str, dict[str, float]] = {run.name: {} for run in due}
        for options in tests:
            for run_name, score in _test(due, models, options).items():
                found[run_name][options] = score
        for run, model in zip(due, models, strict=True):
            # of all tests of the shift together
            routing = rounded(summarize(model.routing_statistics.means()))
            store.add(run, shifts={name: found[run.name]}, shift_routing={name: routing})
    return absent


def _load(run: Run, options: str) -> Any:
    return load_trained(run.config(*shlex.split(options)), str(last_checkpoint(run.folder)))


def _test(runs: Sequence[Run], models: Sequence[Any], options: str) -> dict[str, float]:
    configs = [run.config(*shlex.split(options)) for run in runs]
    init_default_scope(configs[0].get('default_scope', 'mmengine'))
    loader = Runner.build_dataloader(configs[0].test_dataloader, seed=0)
    evaluators = [Evaluator(config.test_evaluator) for config in configs]
    for evaluator in evaluators:
        evaluator.dataset_meta = loader.dataset.metainfo
    with torch.no_grad():
        for batch in tqdm(loader, desc=options.rpartition('=')[2]):
            for model, evaluator in zip(models, evaluators, strict=True):
                evaluator.process(data_samples=model.test_step(batch), data_batch=batch)
    count = len(loader.dataset)
    return {
        run.name: float(evaluator.evaluate(count)[run.comparison.metric])
        for run, evaluator in zip(runs, evaluators, strict=True)
    }


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
    # weights are verified when they are loaded
    iterations = {p: read_content(str(p), False)['meta']['iter'] for p in candidates(run.folder)}
    files = sorted(iterations, key=iterations.__getitem__)
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


def routing_numbers(routing: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What a table says of a run's routing, as 'decider/measure': means over layers."""
    layers = routing.get('layers', {})
    deciders = (n.rpartition('/')[0] for numbers in layers.values() for n in numbers if '/' in n)
    for decider in dict.fromkeys(deciders):
        shifts, changes = routing['shifts'], routing['changes']
        for name, of in _MEASURES.items():
            found = [layer[n] for layer in layers.values() if (n := of.format(decider)) in layer]
            yield f'{decider}/{name}', float(np.mean(found)) if found else math.nan
        corrupted = [_kept(routing, decider, shifts[n]) for n in shifts if n.endswith(_CORRUPTED)]
        before = _kept(routing, decider, *changes[-1:])
        yield f'{decider}/kept since the checkpoint before', before
        yield f'{decider}/kept when mirrored', _kept(routing, decider, shifts['flip'])
        yield f'{decider}/kept when corrupted', float(np.mean(corrupted))


_CORRUPTED = f' {SEVERITY}'  # ends the names of corruptions
_MEASURES = {
    'load entropy': '{}/load_entropy',
    'information on the class': '{}/normalized_mutual_information',
    'effective rank, before': 'effective_rank_before',
    'after': 'effective_rank_after',
    'similarity of answers': 'similarity_outputs',
}


def _kept(routing: Mapping[str, Any], decider: str, changes: Mapping[str, float] = {}) -> float:
    """Share of tokens whose expert stays, beyond chance of the last load; mean over layers."""
    found = [
        kept_beyond_chance(changes[f'{name}.{decider}'], numbers[f'{decider}/changed_by_chance'])
        for name, numbers in routing['layers'].items()
        if f'{name}.{decider}' in changes and numbers[f'{decider}/changed_by_chance'] > 0
    ]
    return float(np.mean(found)) if found else math.nan
