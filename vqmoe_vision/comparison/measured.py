"""What was measured of finished runs later: their scores under shifts, and how they route.

Nothing is trained for it: the last checkpoints are tested again, all of them on the same images,
which are read and changed once. docs/reference/measures.md defines the measures of routing.
"""

import json
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

from vqmoe_vision.analysis.measures import kept_beyond_chance
from vqmoe_vision.analysis.shifts import CORRUPTIONS, all_shifts, convergence, routing_changes
from vqmoe_vision.analysis.source import images_of, source_of
from vqmoe_vision.analysis.survey import survey
from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.checkpoint_files import candidates, last_checkpoint
from vqmoe_vision.engine.model import load_trained
from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.collect import summarize
from vqmoe_vision.moe.config import check

from .spec import Comparison, words_of
from .store import Run, Store, Usable

NUM_IMAGES = 1000  # of the test
SHIFTED_IMAGES = 100
SEVERITY = 3


def expanded(line: str) -> list[str]:
    """The options of each test that a shift stands for: of each corruption, if it names them."""
    place = '{corruption}'
    return [line.replace(place, name) for name in CORRUPTIONS] if place in line else [line]


def rounded(value: Any) -> Any:
    """Numbers to five digits, so that a row is a few kilobytes."""
    return json.loads(json.dumps(value), parse_float=lambda digits: float(f'{float(digits):.5g}'))


def check_shifts(run: Run) -> None:
    """Refuses shifts whose options no config takes, before anything is trained."""
    for name, line in run.comparison.shifts.items():
        words = words_of(f'shifts.{name}', expanded(line)[0])
        try:
            run.merged(*words)
        except ValueError as error:
            raise ValueError(f'shifts.{name}={line!r} is not possible: {error}') from error
        others = [word for word in words if not word.startswith(('test_', 'model.'))]
        allowed = "options of the test, which begin with 'test_' or 'model.'"
        check(not others, f'shifts.{name}', others, allowed)


def shift_scores(comparison: Comparison, content: Mapping[str, Any]) -> dict[str, float]:
    """The score of a row under each shift of which all tests were made as they are written."""
    found = content.get('shifts', {})
    return {
        name: sum(found[name].values()) / len(found[name])
        for name, line in comparison.shifts.items()
        if found.get(name, {}).keys() == {*expanded(line)}
    }


def measure_shifts(runs: Sequence[Run], usable: Usable, store: Store) -> None:
    """Tests finished runs under the shifts that their rows lack."""
    for name, line in runs[0].comparison.shifts.items() if runs else ():
        due = [r for r in runs if name not in shift_scores(r.comparison, usable[r.place])]
        if not due:
            continue
        tests = expanded(line)
        # one model for all of them: they differ in the corruption alone
        first = shlex.split(tests[0])
        models = [load_trained(r.config(*first), str(last_checkpoint(r.folder))) for r in due]
        found = [_test(due, models, shlex.split(options)) for options in tests]
        for run, model, scores in zip(due, models, zip(*found, strict=True), strict=True):
            # of all tests of the shift together
            routing = rounded(summarize(model.routing_statistics.means()))
            shifted = dict(zip(tests, scores, strict=True))
            store.add(run, shifts={name: shifted}, shift_routing={name: routing})


def _test(runs: Sequence[Run], models: Sequence[Any], options: Sequence[str]) -> list[float]:
    configs = [run.config(*options) for run in runs]
    init_default_scope(configs[0].get('default_scope', 'mmengine'))
    loader = Runner.build_dataloader(configs[0].test_dataloader, seed=0)
    evaluators = [Evaluator(config.test_evaluator) for config in configs]
    for evaluator in evaluators:
        evaluator.dataset_meta = loader.dataset.metainfo
    with torch.no_grad():
        for batch in tqdm(loader, desc=options[-1].rpartition('=')[2]):
            for model, evaluator in zip(models, evaluators, strict=True):
                evaluator.process(data_samples=model.test_step(batch), data_batch=batch)
    metric, count = runs[0].comparison.metric, len(loader.dataset)
    return [float(evaluator.evaluate(count)[metric]) for evaluator in evaluators]


def measure_routing(runs: Sequence[Run], usable: Usable, store: Store) -> None:
    """Surveys finished runs whose rows have no such numbers yet."""
    for run in tqdm(runs, unit='run'):
        if 'routing' not in usable[run.place]:
            store.add(run, routing=_routing(run))


def _routing(run: Run) -> dict[str, Any]:
    """Numbers by layer, changes by shift and by checkpoint, convergence; {} of a dense model."""
    config, last = run.config(), last_checkpoint(run.folder)
    model = load_trained(config, str(last))
    layers = moe_layers(model.routed_model)
    if not layers:
        return {}
    source = source_of(model, config, NUM_IMAGES)
    seen = survey(
        model.routed_model,
        source.batches(50),
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
    names = [f'{prefix}.{name}'.lstrip('.') for name in layers]
    states = [each.state_dict() for each in models]
    return rounded(
        {
            'images': seen.images,
            'layers': {name: layer.numbers for name, layer in seen.layers.items()},
            'shifts': seen.shifts,
            'checkpoints': [path.stem for path in files],
            'changes': [
                routing_changes(a.routed_model, b.routed_model, map(images_of, source.batches(50)))
                for a, b in pairwise(models)
            ],
            'convergence': convergence(states, names) if len(files) > 1 else {},
        }
    )


def routing_numbers(routing: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What a table says of a run's routing, as 'decider/measure': means over layers."""
    layers = routing.get('layers', {})
    deciders = (n.rpartition('/')[0] for numbers in layers.values() for n in numbers if '/' in n)
    for decider in dict.fromkeys(deciders):
        for name, of in _MEASURES.items():
            found = [layer[n] for layer in layers.values() if (n := of.format(decider)) in layer]
            yield f'{decider}/{name}', float(np.mean(found)) if found else math.nan
        shifts = {n: _kept(routing, decider, of) for n, of in routing['shifts'].items()}
        corrupted = [kept for n, kept in shifts.items() if n.endswith(f' {SEVERITY}')]
        before = _kept(routing, decider, *routing['changes'][-1:])
        yield f'{decider}/kept since the checkpoint before', before
        yield f'{decider}/kept when mirrored', shifts['flip']
        yield f'{decider}/kept when corrupted', float(np.mean(corrupted))


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
