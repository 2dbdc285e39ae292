"""What rows score on test images that are not as in training: other scales, crops, corruptions.

The statistics of routing are kept beside the scores: codes may be far from tokens of a scale that
they have not seen, which is another thing than what that costs.

Nothing is trained for it: the last checkpoints of finished runs are tested again, all of them on
the same images, which are read and changed once.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from tqdm import tqdm

from vqmoe_vision.engine.checkpoint_files import last_checkpoint
from vqmoe_vision.engine.trained import load_trained
from vqmoe_vision.moe.collect import summarize
from vqmoe_vision.moe.config import check

from .results import Results, Usable, layer_means, rounded
from .runs import Run
from .spec import Comparison, words_of
from .store import Store

PLACE = '{corruption}'
_OF_TESTS = ('test_', 'model.')  # all else of a config changes no test
# As imagecorruptions lists them. It is in the extra `analyze`, which whoever makes tables of what
# was measured need not have.
CORRUPTIONS = (
    'gaussian_noise', 'shot_noise', 'impulse_noise', 'defocus_blur', 'glass_blur', 'motion_blur',
    'zoom_blur', 'snow', 'frost', 'fog', 'brightness', 'contrast', 'elastic_transform', 'pixelate',
    'jpeg_compression',
)  # fmt: skip
Shifts = dict[str, dict[str, float]]  # by name, and by the options of a test


def expanded(line: str) -> list[str]:
    """The options of each test that a shift stands for: of each corruption, if it names them."""
    if PLACE not in line:
        return [line]
    return [line.replace(PLACE, name) for name in CORRUPTIONS]


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


def mean_scores(comparison: Comparison, found: Shifts) -> dict[str, float]:
    """The score under each shift of which all tests were made as they are written today."""
    scores = {}
    for name in filter(found.__contains__, comparison.shifts):
        values = found[name]
        if values.keys() == set(expanded(comparison.shifts[name])):
            scores[name] = sum(values.values()) / len(values)
    return scores


def shifted_scores(
    comparison: Comparison, results: Results
) -> dict[str, dict[str, dict[int, float]]]:
    """The scores of all runs that were measured, by shift, row and seed."""
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for (row, seed), content in results.usable.items():
        for name, score in mean_scores(comparison, content.get('shifts', {})).items():
            scores.setdefault(name, {}).setdefault(row, {})[seed] = score
    return scores


def shifted_layers(
    comparison: Comparison, results: Results, statistic: str
) -> dict[str, dict[str, list[float]]]:
    """A statistic of each layer as mean over the seeds that have it, by shift and row."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for (row, _), content in results.usable.items():
        kept = content.get('shift_routing', {})
        for shift in filter(kept.__contains__, mean_scores(comparison, content.get('shifts', {}))):
            found.setdefault(shift, {}).setdefault(row, []).append(kept[shift])
    means = {
        shift: {row: layer_means(numbers, statistic) for row, numbers in by_row.items()}
        for shift, by_row in found.items()
    }
    return {shift: by_row for shift, by_row in means.items() if any(by_row.values())}


def measure_shifts(runs: Sequence[Run], store: Store) -> list[str]:
    """Tests finished runs under the shifts that they lack, and adds what is found to their rows."""
    usable, present, absent = store.with_checkpoints(runs)
    for name, line in runs[0].comparison.shifts.items() if runs else ():
        due = [run for run in present if not _is_measured(name, run, usable)]
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


def _is_measured(name: str, run: Run, usable: Usable) -> bool:
    return name in mean_scores(run.comparison, usable[run.row, run.seed].get('shifts', {}))


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
