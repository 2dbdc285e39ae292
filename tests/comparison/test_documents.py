"""Scores and intervals that documents print are those of the rows that are checked in."""

from __future__ import annotations

import itertools
import math
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
from scipy.stats import t

from vqmoe_vision.comparison.outcome import Outcome
from vqmoe_vision.comparison.runs import WORK_DIR
from vqmoe_vision.comparison.statistics import Scores
from vqmoe_vision.comparison.work import Work

from ..rows import CONFIGS

ROOT = CONFIGS.parent
ROWS = ROOT / 'docs/results/rows'
DOCUMENTS = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
# '-0.71 (-1.62 to +0.19' and '-0.71, -1.62 to +0.19'; in prose, 'by 0.71 (-1.62 to +0.19'
INTERVAL = re.compile(
    r'([+-]?\d+\.\d+)(?: \(|, )(?:95 % interval )?([+-]\d+\.\d+) to ([+-]\d+\.\d+)'
)
# the scores of a row by seed, and their mean if the next cell has it
SCORES = re.compile(r'\| (\d+\.\d\d(?:, \d+\.\d\d){2,}) \|(?: (\d+\.\d\d) \|)?')
# what no score is of: differences of the shares of tokens that keep their expert, and of errors
# of quantization, which rows hold beside the scores
OTHERS = {
    'findings.md': {(0.019, -0.009, 0.048), (0.004, -0.005, 0.013)},
    'results.md': {(0.056, 0.032, 0.08), (0.057, 0.034, 0.079)},
}
Interval = tuple[float, float, float]


def outcomes() -> Iterator[Outcome]:
    for folder in sorted(ROWS.iterdir()):
        spec = str(CONFIGS / f'comparisons/{folder.name}.py')
        work = Work(Namespace(spec=spec, work_dir=WORK_DIR, results=ROWS.parent), whole=True)
        yield Outcome(work.comparison, work.read())


def sets_of_scores(outcome: Outcome) -> Iterator[Scores]:
    yield outcome.scores
    yield from outcome.shifted.values()
    yield from outcome.left.values()
    if held := outcome.held_out:
        yield held
        yield {  # both sets of images together
            row: {s: (of[s] + held[row][s]) / 2 for s in of.keys() & held[row].keys()}
            for row, of in outcome.scores.items()
            if row in held
        }


def interval(differences: list[float]) -> Interval:
    """The mean and its 95 % interval by Student's t, unrounded."""
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((each - mean) ** 2 for each in differences) / (n - 1)
    half = float(t.ppf(0.975, n - 1)) * math.sqrt(variance / n)
    return mean, mean - half, mean + half


def as_printed(mean: float, low: float, high: float, digits: int) -> Interval:
    """Without the sign of the mean, which prose has in its words; the bounds tell it."""
    return round(abs(mean), digits), round(low, digits) + 0.0, round(high, digits) + 0.0


def intervals_of(outcome: Outcome) -> Iterator[Interval]:
    if outcome.screens:  # with the noise of all rows
        for reference in outcome.scores:
            turned = Outcome(outcome.comparison, outcome.results, reference=reference)
            for each in turned.differences.values():
                yield each.mean, each.low, each.high
        return
    for scores in sets_of_scores(outcome):
        for one, other in itertools.permutations(scores, 2):
            seeds = sorted(scores[one].keys() & scores[other].keys())
            if len(seeds) > 1:
                yield interval([scores[one][seed] - scores[other][seed] for seed in seeds])


@pytest.fixture(scope='module')
def known() -> tuple[set[Interval], set[tuple[float, ...]]]:
    """Every interval that rows give, with one digit and with two, and every row's scores."""
    patched = pytest.MonkeyPatch()
    patched.chdir(ROOT)
    intervals, scores = set(), set()
    for outcome in outcomes():
        for each in intervals_of(outcome):
            intervals |= {as_printed(*each, digits) for digits in (1, 2)}
        for by_row in sets_of_scores(outcome):
            scores |= {tuple(round(of[s], 2) for s in sorted(of)) for of in by_row.values()}
    patched.undo()
    return intervals, scores


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_intervals_of_documents_are_those_of_rows(path: Path, known) -> None:
    wrong = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for found in INTERVAL.finditer(line):
            mean, low, high = map(float, found.groups())
            printed = abs(mean), low + 0.0, high + 0.0
            if printed not in known[0] and printed not in OTHERS.get(path.name, ()):
                wrong.append(f'{number}: {found[0]}')
    assert not wrong


def test_scores_of_tables_are_those_of_rows(known) -> None:
    wrong, count = [], 0
    for number, line in enumerate((ROOT / 'docs/results.md').read_text().splitlines(), 1):
        for found in SCORES.finditer(line):
            count += 1
            scores = tuple(map(float, found[1].split(', ')))
            mean = f'{sum(scores) / len(scores):.2f}'
            if scores not in known[1] or found[2] not in (None, mean):
                wrong.append(f'{number}: {found[0]}')
    assert count and not wrong
