"""Tables and intervals that documents print are those of the rows that are checked in."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from itertools import product

import pytest

from vqmoe_vision.arguments import WORK_DIR
from vqmoe_vision.comparison.cli import Work
from vqmoe_vision.comparison.frame import HELD_OUT, LEFT, TEST, forest, scores_of, tidy
from vqmoe_vision.comparison.pages import Made, fill
from vqmoe_vision.comparison.statistics import Difference, differences, pooled_noise, with_noise

from ..rows import CONFIGS

pytestmark = pytest.mark.pages
ROOT = CONFIGS.parent
ROWS = ROOT / 'docs/results/rows'
# '-0.71 (-1.62 to +0.19' and '-0.71, -1.62 to +0.19'; in prose, 'by 0.71 (-1.62 to +0.19'
INTERVAL = re.compile(r'([+-]?\d+\.\d+)(?: \(|, )([+-]\d+\.\d+) to ([+-]\d+\.\d+)')
DOCUMENTS = [  # those that print an interval
    path
    for path in [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*/*.md'))]
    if path.parent.name != 'archive' and INTERVAL.search(path.read_text())
]
MADE = [path for path in DOCUMENTS if '<!-- compare ' in path.read_text()]
FROM_SCRATCH = ('cifar10_budget', 'cifar10_stream', 'cifar10_long', 'cifar10_muon')
FROM_SCRATCH += ('cifar100', 'imagenette', 'camvid_budget')
FURTHER = ('vqmoe_official - smoe', 'vqmoe - smoe', 'position - smoe', 'dense_2x - dense_1x')
FURTHER += ('smoe_frozen - dense_2x',)  # contrasts that findings names beside the comparisons' own
Interval = tuple[float, ...]


@pytest.fixture(scope='module')
def outcomes() -> dict[str, Made]:
    """The comparisons that are checked in, by name."""
    found, given = {}, {'work_dir': WORK_DIR, 'results': ROWS.parent, 'rows': None, 'seeds': None}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        for folder in sorted(ROWS.iterdir()):
            work = Work(Namespace(spec=str(CONFIGS / f'comparisons/{folder.name}.py'), **given))
            made = work.comparison, work.read()
            found[folder.name] = Made(*made, tidy(*made))
    return found


def differences_of(of: Made) -> Iterator[Difference]:
    """Of every pair of rows; by the noise of all rows where there are two seeds."""
    metric, shifts = of.comparison.metric, of.comparison.shifts
    for which in ((TEST, metric), (HELD_OUT, metric), *product(shifts, (metric, LEFT))):
        scores = scores_of(of.values, *which)
        for reference in scores:
            for found in differences(scores, reference).values():
                two = len(of.comparison.seeds) == 2
                yield with_noise(found, *pooled_noise(scores)) if two else found


@pytest.fixture(scope='module')
def known(outcomes: dict[str, Made]) -> set[Interval]:
    """Every interval that rows give, with one digit and with two."""
    found = [d for of in outcomes.values() for d in differences_of(of)]
    ends = [(d.mean, d.low, d.high) for d in found]
    together = forest({name: outcomes[name] for name in FROM_SCRATCH}, FURTHER)
    by_noise = [forest({name: made}) for name, made in outcomes.items()]
    for frame in (together, *by_noise):
        ends += frame[['difference', 'low', 'high']].itertuples(index=False, name=None)
    return {
        tuple(round(value, digits) + 0.0 for value in (abs(mean), *turned))
        for mean, low, high in ends
        for turned in ((low, high), (-high, -low))  # prose may turn a difference
        for digits in (1, 2)  # without the sign of the mean: the bounds tell it
    }


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_intervals_of_documents_are_those_of_rows(path, known):
    wrong = []
    prose = re.sub('<!-- compare .*?<!-- end -->', '', path.read_text(), flags=re.DOTALL)
    for found in INTERVAL.finditer(' '.join(prose.split())):  # over ends of lines
        mean, low, high = map(float, found.groups())
        if (abs(mean), low + 0.0, high + 0.0) not in known:
            wrong.append(found[0])
    assert not wrong


@pytest.mark.parametrize('path', MADE, ids=lambda path: path.name)
def test_tables_of_pages_are_made_of_rows(path, outcomes):
    made = fill(path.read_text(), outcomes.__getitem__, ROWS.parent)
    assert made == path.read_text(), f'python tools/compare.py pages {path.relative_to(ROOT)}'
