"""Scores, intervals and p that documents print are those of the rows that are checked in."""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations
from pathlib import Path

import pandas as pd
import pytest

from vqmoe_vision.comparison.cli import Work
from vqmoe_vision.comparison.frame import HELD_OUT, LEFT, TEST, scores_of, tidy
from vqmoe_vision.comparison.spec import Comparison
from vqmoe_vision.comparison.statistics import (
    Difference,
    Scores,
    differences,
    holm,
    paired_difference,
    pooled_noise,
    with_noise,
)
from vqmoe_vision.comparison.store import WORK_DIR

from ..rows import CONFIGS

ROOT = CONFIGS.parent
ROWS = ROOT / 'docs/results/rows'
# '-0.71 (-1.62 to +0.19' and '-0.71, -1.62 to +0.19'; in prose, 'by 0.71 (-1.62 to +0.19'
INTERVAL = re.compile(
    r'([+-]?\d+\.\d+)(?: \(|, )(?:95 % interval )?([+-]\d+\.\d+) to ([+-]\d+\.\d+)'
)
DOCUMENTS = [  # those that print an interval
    path
    for path in [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
    if INTERVAL.search(path.read_text())
]
# and what follows: ', p = 0.04', ', p below 0.001', or ') | 0.040 |' in a table
P = re.compile(
    INTERVAL.pattern + r'(?:\) \|(?: p)? |\)?[,;]? p (?:= )?)(below |< )?([01]\.\d+|1)\b'
)
# the scores of a row by seed, and their mean if the next cell has it
SCORES = re.compile(r'\| (\d+\.\d\d(?:, \d+\.\d\d){2,}) \|(?: (\d+\.\d\d) \|)?')
# what no score is of: differences of the shares of tokens that keep their expert, and of errors
# of quantization, which rows hold beside the scores
OTHERS = {
    'findings.md': {(0.019, -0.009, 0.048), (0.004, -0.005, 0.013)},
    'results.md': {(0.056, 0.032, 0.08), (0.057, 0.034, 0.079)},
}
# p that is corrected for another number than the rows beside a reference, as its line says
FAMILIES = {'results.md': {((0.25, -0.42, -0.08), 0.1)}}
# whose rows are rows of another comparison with one more option, at the same seeds
ONCE_MORE = {'cifar10_stream': 'cifar10_budget'}
Interval = tuple[float, float, float]
Known = Mapping[Interval, set[float]]


@dataclass(frozen=True)
class Outcome:
    """The numbers of a comparison that is checked in."""

    comparison: Comparison
    values: pd.DataFrame

    @property
    def screens(self) -> bool:
        return len(self.comparison.seeds) == 2

    @cached_property
    def scores(self) -> Scores:
        return scores_of(self.values, TEST, self.comparison.metric)

    @cached_property
    def held_out(self) -> Scores:
        return scores_of(self.values, HELD_OUT, self.comparison.metric)

    def shifted(self) -> Iterator[Scores]:
        for name in (self.comparison.metric, LEFT):
            yield from (scores_of(self.values, shift, name) for shift in self.comparison.shifts)


def outcomes() -> Iterator[Outcome]:
    for folder in sorted(ROWS.iterdir()):
        spec = str(CONFIGS / f'comparisons/{folder.name}.py')
        given = {'work_dir': WORK_DIR, 'results': ROWS.parent, 'rows': None, 'seeds': None}
        work = Work(Namespace(spec=spec, **given))
        yield Outcome(work.comparison, tidy(work.comparison, work.read()))


def scores_of_images(outcome: Outcome) -> Iterator[Scores]:
    """Of the test images, of those held out, and of both together."""
    yield outcome.scores
    if held := outcome.held_out:
        yield held
        yield {
            row: {s: (of[s] + held[row][s]) / 2 for s in of.keys() & held[row].keys()}
            for row, of in outcome.scores.items()
            if row in held
        }


def sets_of_scores(outcome: Outcome) -> Iterator[Scores]:
    yield from scores_of_images(outcome)
    yield from outcome.shifted()


def with_p(
    found: Mapping[str, Difference], planned: int
) -> Iterator[tuple[Difference, set[float]]]:
    """Differences with an interval, and p corrected for all planned ones; none of equal rows."""
    corrected = holm({name: each.p for name, each in found.items() if each.p == each.p}, planned)
    for name, each in found.items():
        if each.pairs > 1:
            yield each, {corrected[name]} if name in corrected else set()


def differences_of(outcome: Outcome) -> Iterator[tuple[Difference, set[float]]]:
    """Every interval that the rows give, and p of it corrected for all rows."""
    planned = len(outcome.comparison.rows) - 1
    for scores in [outcome.scores] if outcome.screens else sets_of_scores(outcome):
        for reference in scores:
            found = differences(scores, reference)
            if outcome.screens:  # with the noise of all rows
                noise = pooled_noise([scores])
                found = {row: with_noise(each, *noise) for row, each in found.items()}
            yield from with_p(found, planned)


def differences_between(more: Outcome, less: Outcome) -> Iterator[tuple[Difference, set[float]]]:
    """What one more option gives each row, and by how much more it gives one than another.

    The first is corrected for all rows, the second for all pairs of them.
    """
    rows = [row for row in more.comparison.rows if row in less.comparison.rows]
    for with_it, without in zip(scores_of_images(more), scores_of_images(less), strict=True):
        gains = {
            row: paired_difference(with_it[row], without[row])
            for row in rows
            if with_it.get(row, {}).keys() >= set(more.comparison.seeds)
        }
        pairs = {
            f'{a} {b}': paired_difference(gains[a].each, gains[b].each)
            for a, b in combinations(gains, 2)
        }
        yield from with_p(gains, len(rows))
        yield from with_p(pairs, math.comb(len(rows), 2))


def pooled(of: Iterable[Outcome]) -> Iterator[tuple[Difference, set[float]]]:
    """SMoE less its frozen router, over the pairs of all comparisons that have both."""
    for kind in ('scores', 'held_out'):
        found: list[float] = []
        for outcome in (each for each in of if not each.screens):
            rows = getattr(outcome, kind)
            made = '_started' if 'smoe_started' in rows else ''  # of a dense checkpoint
            smoe, frozen = (rows.get(f'{row}{made}', {}) for row in ('smoe', 'smoe_frozen'))
            found += paired_difference(smoe, frozen).each.values()
        assert len(found) == 38
        yield paired_difference(dict(enumerate(found)), dict.fromkeys(range(38), 0.0)), set()


@pytest.fixture(scope='module')
def known() -> tuple[Known, set[tuple[float, ...]]]:
    """Every interval that rows give, with one digit and with two, its p, and rows' scores."""
    patched = pytest.MonkeyPatch()
    patched.chdir(ROOT)
    intervals: dict[Interval, set[float]] = {}
    scores = set()
    of = {outcome.comparison.name: outcome for outcome in outcomes()}
    found = [differences_of(outcome) for outcome in of.values()]
    found += [differences_between(of[more], of[less]) for more, less in ONCE_MORE.items()]
    found.append(pooled(of.values()))
    for d, p in chain.from_iterable(found):
        for turned in ((d.low, d.high), (-d.high, -d.low)):  # prose may turn a difference
            for digits in (1, 2):  # without the sign of the mean: the bounds tell it
                printed = tuple(round(value, digits) + 0.0 for value in (abs(d.mean), *turned))
                intervals.setdefault(printed, set()).update(p)
    for outcome in of.values():
        for by_row in sets_of_scores(outcome):
            scores |= {tuple(round(of[s], 2) for s in sorted(of)) for of in by_row.values()}
    patched.undo()
    return intervals, scores


def found_in(path: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, re.Match[str]]]:
    """Every match of a line, and what to say of it: where it stands, and what is printed."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for found in pattern.finditer(line):
            yield f'{path.name}:{number}: {found[0]}', found


def interval_of(found: re.Match[str]) -> Interval:
    """What `INTERVAL` has matched, as the keys of what is known."""
    mean, low, high = map(float, found.groups()[:3])
    return abs(mean), low + 0.0, high + 0.0


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_intervals_of_documents_are_those_of_rows(path: Path, known) -> None:
    right = known[0].keys() | OTHERS.get(path.name, set())
    assert not [said for said, found in found_in(path, INTERVAL) if interval_of(found) not in right]


def test_p_of_documents_are_those_of_rows(known) -> None:
    wrong, count = [], 0
    for path in DOCUMENTS:
        for said, found in found_in(path, P):
            count += 1
            below, p = found.groups()[3:]
            printed, digits = interval_of(found), len(p.partition('.')[2])
            if printed in OTHERS.get(path.name, ()):  # of no score
                continue
            if (printed, float(p)) in FAMILIES.get(path.name, ()):
                continue
            own = known[0].get(printed, set())
            if not any(x < float(p) if below else round(x, digits) == float(p) for x in own):
                wrong.append(said)
    assert count and not wrong


def test_scores_of_tables_are_those_of_rows(known) -> None:
    wrong, count = [], 0
    for said, found in found_in(ROOT / 'docs/evidence/results.md', SCORES):
        count += 1
        scores = tuple(map(float, found[1].split(', ')))
        mean = f'{sum(scores) / len(scores):.2f}'
        if scores not in known[1] or found[2] not in (None, mean):
            wrong.append(said)
    assert count and not wrong


CONTROL = {'1, faint': 1.0, '3, clear': 3.0}  # separations by line of the README
CONTROLLED = ('oracle', 'xmoe', 'smoe', 'vqmoe', 'dense_2x', 'frozen')


def test_the_control_in_the_readme_is_its_record() -> None:
    scores = json.loads((ROOT / 'docs/results/control.json').read_text())['rows']
    readme = (ROOT / 'README.md').read_text()
    for line, separation in CONTROL.items():
        of = {
            row: [x['accuracy'] for x in scores if (x['row'], x['separation']) == (row, separation)]
            for row in CONTROLLED
        }
        means = ' | '.join(f'{sum(all_) / len(all_):.1f}' for all_ in of.values())
        assert f'| {line} | {means} |' in readme


# of the README's table: comparisons by column, and rows by how a line begins
COLUMNS = [f'{name}_budget' for name in ('cifar10', 'cifar100', 'imagenette', 'camvid')]
COLUMNS.insert(1, 'cifar10_long')
LINES = {
    'dense-2x, the compute of two experts': 'dense_2x',
    'SMoE': 'smoe',
    'SMoE, router frozen at random': 'smoe_frozen',
    'VQMoE': 'vqmoe',
    'experts by position': 'position',
}


def test_the_table_of_the_readme_is_that_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = [line.strip('|').split('|') for line in (ROOT / 'README.md').read_text().splitlines()]
    found = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}
    of = {each.comparison.name: each for each in outcomes()}
    for column, name in enumerate(COLUMNS):
        scores, planned = of[name].scores, len(of[name].comparison.rows) - 1
        found_of = differences(scores, 'dense_2x')
        p = holm({row: each.p for row, each in found_of.items() if each.p == each.p}, planned)
        for line, row in LINES.items():
            expected = f'{sum(scores[row].values()) / len(scores[row]):.1f}'
            if row in p:
                word = 'better' if found_of[row].mean > 0 else 'worse'
                expected += ' n.s.' if p[row] >= 0.05 else f' {word}'
            assert found[line][column] == expected, (line, name)
