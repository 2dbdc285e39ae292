"""What the results of a comparison say: each number once, for tables, sentences and figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from .controls import challengers
from .results import Results
from .shifts import shifted_scores
from .spec import Comparison, choose
from .statistics import (
    FEW_SEEDS,
    Difference,
    Scores,
    differences,
    holm,
    noise_of_all,
    paired_difference,
    with_noise,
)


class Outcome:
    """Scores and differences of a comparison, or of a part of it that is shown."""

    def __init__(
        self,
        comparison: Comparison,
        results: Results,
        rows: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        reference: str | None = None,
    ) -> None:
        self.planned_reference = comparison.reference
        if reference is not None:
            (reference,) = choose('--reference', [reference], comparison.rows)
            comparison = replace(comparison, reference=reference)
        pairs = comparison.selected(rows, seeds)
        self.comparison = comparison
        self.wanted = {row for row, _ in pairs}
        shown = self.wanted | {comparison.reference}
        self.rows = [row for row in comparison.rows if row in shown]
        self.seeds = list(dict.fromkeys(seed for _, seed in pairs))
        self.results = self._restricted(results, self.rows)
        self._whole = self._restricted(results, list(comparison.rows))

    @property
    def partial(self) -> bool:
        """Whether some row or seed of the comparison is not shown."""
        whole = self.comparison
        return len(self.rows) < len(whole.rows) or len(self.seeds) < len(whole.seeds)

    @property
    def turned(self) -> bool:
        """Whether differences are to another row than the comparison's own reference."""
        return self.comparison.reference != self.planned_reference

    @property
    def name(self) -> str:
        """What its files begin with: neither a part nor another reference overwrites the whole."""
        name = self.comparison.name
        if self.turned:
            name += f'-reference-{self.comparison.reference}'
        return f'{name}-part' if self.partial else name

    @property
    def screens(self) -> bool:
        """Whether seeds are so few that one row's own noise says nothing, and all rows tell it."""
        return len(self.comparison.seeds) <= FEW_SEEDS

    @cached_property
    def noise(self) -> tuple[float, int]:
        """Of a difference at one seed, from all rows together, and its degrees of freedom."""
        return noise_of_all(self.scores, self.comparison.seeds)

    @property
    def hidden(self) -> int:
        """How many seeds of the comparison are not shown."""
        return len(self.comparison.seeds) - len(self.seeds)

    @property
    def planned(self) -> int:
        """How many there will be: whoever looks at two rows of twenty had twenty to look at."""
        return len(self.comparison.rows) - 1

    @cached_property
    def by_row(self) -> dict[str, list[dict[str, Any]]]:
        """Contents of the files of each row that is shown, in their order, if it has any."""
        return _by_row(self.rows, self.results)

    @cached_property
    def machines(self) -> list[str]:
        """All that any run shown was trained on."""
        return sorted({content['hardware'] for content in self.results.usable.values()})

    @cached_property
    def scores(self) -> dict[str, dict[int, float]]:
        """The metric by row and seed, of all rows."""
        return scores_of(self.comparison, self._whole)

    @cached_property
    def differences(self) -> dict[str, Difference]:
        """Of all rows to the reference."""
        found = differences(self.scores, self.comparison.reference)
        return self._tested(found, self.scores)

    @cached_property
    def corrected(self) -> dict[str, float]:
        """Their p, corrected for the rows that are planned; nan before a row is finished."""
        return self._corrected(self.differences, self.planned)

    @cached_property
    def held_out(self) -> dict[str, dict[int, float]]:
        """The metric of the same checkpoints on held-out images, of all rows that are tested."""
        if not self.comparison.tested:  # `scores` are of these images
            return {}
        by_row = _by_row(self.comparison.rows, self._whole)
        found = {row: dict(filter(None, map(_held_out, runs))) for row, runs in by_row.items()}
        return {row: by_seed for row, by_seed in found.items() if by_seed}

    @cached_property
    def held_out_differences(self) -> dict[str, Difference]:
        """Of all rows to the reference, on held-out images."""
        found = differences(self.held_out, self.comparison.reference)
        return self._tested(found, self.held_out)

    def may_have(self, name: str) -> bool:
        """Whether a test has a number of that name, or may have it of a row that has none yet."""
        tests = (content['test'] for content in self._whole.usable.values())
        has = any(name in (key, key.rpartition('/')[2]) for test in tests for key in test)
        return has or self.scores.keys() != self.comparison.rows.keys()

    @cached_property
    def shifted(self) -> dict[str, dict[str, dict[int, float]]]:
        """The scores under shifts, by shift, row and seed, of what is shown."""
        return shifted_scores(self.comparison, self.results)

    @cached_property
    def shifted_differences(self) -> dict[str, dict[str, Difference]]:
        """Their differences to the reference, by shift and row."""
        return self._by_shift(self._shifted_of_all)

    @cached_property
    def left(self) -> dict[str, Scores]:
        """What is left under shifts of a run's own score, in percent, of what is shown."""
        return self._left(self.shifted)

    @cached_property
    def left_differences(self) -> dict[str, dict[str, Difference]]:
        """Its differences to the reference, by shift and row."""
        return self._by_shift(self._left(self._shifted_of_all))

    def against(self, control: str) -> tuple[dict[str, Difference], dict[str, float]]:
        """The differences to a control of the rows that it is there for, and their corrected p."""
        rows = challengers(self.comparison, control)
        base = self.scores.get(control, {})
        found = {r: paired_difference(self.scores[r], base) for r in rows if r in self.scores}
        found = self._tested(found, self.scores)
        return found, self._corrected(found, len(rows))

    def finished(self, difference: Difference) -> bool:
        """Whether it is one over all seeds of the comparison: a verdict on less is a look ahead."""
        return difference.pairs == len(self.comparison.seeds)

    @cached_property
    def _shifted_of_all(self) -> Mapping[str, Scores]:
        return shifted_scores(self.comparison, self._whole)

    def _left(self, shifted: Mapping[str, Scores]) -> dict[str, Scores]:
        return {
            shift: {
                row: {
                    seed: 100 * score / self.scores[row][seed]
                    for seed, score in by_seed.items()
                    if self.scores[row][seed]
                }
                for row, by_seed in by_row.items()
            }
            for shift, by_row in shifted.items()
        }

    def _by_shift(self, whole: Mapping[str, Scores]) -> dict[str, dict[str, Difference]]:
        found = {}
        for shift in self.shifted:
            each = differences(whole[shift], self.comparison.reference)
            each = self._tested(each, whole[shift])
            found[shift] = {row: each[row] for row in self.rows if row in each}
        return found

    def _tested(self, found: dict[str, Difference], scores: Scores) -> dict[str, Difference]:
        """With the noise of all rows, if each has so few seeds that its own is not known."""
        if not self.screens:
            return found
        noise = noise_of_all(scores, self.comparison.seeds)
        return {row: with_noise(each, *noise) for row, each in found.items()}

    def _corrected(self, found: dict[str, Difference], planned: int) -> dict[str, float]:
        # an early p may be small by chance, and then the finished rows would get smaller factors
        p = {row: each.p if self.finished(each) else math.nan for row, each in found.items()}
        return holm(p, planned)

    def _restricted(self, results: Results, rows: Sequence[str]) -> Results:
        shown = {(row, seed) for row in rows for seed in self.seeds}
        return results.restricted(shown, self.comparison.selected())


def scores_of(comparison: Comparison, results: Results) -> dict[str, dict[int, float]]:
    """The metric by row, in the order of the comparison, and seed."""
    return {
        row: {content['seed']: content['test'][comparison.metric] for content in contents}
        for row, contents in _by_row(comparison.rows, results).items()
    }


def _held_out(content: dict[str, Any]) -> tuple[int, float] | None:
    """Seed and metric of the last validation, if the checkpoint that is tested had one."""
    iteration, score = content['held_out'][-1] if content['held_out'] else (None, math.nan)
    return (content['seed'], score) if iteration == content['iterations'] else None


def _by_row(rows: Iterable[str], results: Results) -> dict[str, list[dict[str, Any]]]:
    by_row: dict[str, list[dict[str, Any]]] = {}
    for (row, _), content in results.usable.items():
        by_row.setdefault(row, []).append(content)
    return {row: by_row[row] for row in rows if row in by_row}
