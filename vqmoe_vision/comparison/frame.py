"""Numbers of a comparison as one tidy frame, and the summary of each row by it."""

import math
from base64 import b64decode
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vqmoe_vision.engine.escaping import as_cell
from vqmoe_vision.moe.config import check

from .figures import PREDICTED, TOGETHER
from .measured import routing_numbers, shift_scores
from .spec import Comparison, pair_of
from .statistics import (
    LEVEL,
    Difference,
    Scores,
    differences,
    equivalence,
    holm,
    over_images,
    paired_difference,
    pooled_noise,
    together,
    with_noise,
)
from .store import Results

UNEQUAL = 0.05  # share of the reference's compute
TEST, HELD_OUT, ROUTING = 'test', 'held out', 'routing'  # splits beside the shifts
LEFT = 'left, %'  # of a run's own score, under a shift

LAYERS = {
    'unused_experts': 'load_unused',
    'load_perplexity': 'load_perplexity',
    'code_perplexity': 'code_usage_perplexity',
}


class Made(NamedTuple):
    """A comparison, what is there of it, and its numbers."""

    comparison: Comparison
    results: Results
    values: pd.DataFrame


def tidy(comparison: Comparison, results: Results) -> pd.DataFrame:
    """What tests gave of every run: a line each of row, seed, split, name and value."""
    lines = []
    for row in comparison.rows:
        for (result_row, seed), content in results.usable.items():
            if result_row == row:
                with _naming_file(row, seed):
                    lines += [(row, seed, *n) for n in _numbers(comparison, content)]
    return pd.DataFrame(lines, columns=['row', 'seed', 'split', 'name', 'value'])


@contextmanager
def _naming_file(row: str, seed: int) -> Iterator[None]:
    """Name the file of a row in the error that its content causes."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{row}-seed{seed}.json is damaged: {error!r}') from error


def _numbers(comparison: Comparison, content: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    metric, test = comparison.metric, content['test']
    yield from ((TEST, name, value) for name, value in test.items())
    last, score = (content['held_out'] or [(None, math.nan)])[-1]
    if comparison.tested and last == content['iterations']:  # the checkpoint that is tested
        yield HELD_OUT, metric, score
    for shift, score in shift_scores(comparison, content).items():
        yield shift, metric, score
        yield from [(shift, LEFT, 100 * score / test[metric])] if test[metric] else []
        routed = content.get('shift_routing', {}).get(shift, {})
        yield from ((shift, name, value) for name, value in routed.items())
    yield from ((ROUTING, *each) for each in routing_numbers(content.get('routing', {})))


def scores_of(values: pd.DataFrame, split: str, name: str) -> Scores:
    """A number by row and seed."""
    of = values[(values['split'] == split) & (values['name'] == name)]
    return {
        str(row): dict(zip(of_row['seed'], of_row['value'], strict=True))
        for row, of_row in of.groupby('row', sort=False)
    }


def compared(
    comparison: Comparison, values: pd.DataFrame, split: str = TEST, name: str | None = None
) -> dict[str, Difference]:
    """The difference of each row to the reference."""
    return differences(scores_of(values, split, name or comparison.metric), comparison.reference)


def contrasts(comparison: Comparison, results: Results, values: pd.DataFrame) -> pd.DataFrame:
    """What a comparison asks first: its contrasts, by the noise of its budget.

    Columns that begin with `held_out_` are the same of validation images, by their own noise.
    """
    frame = _tested(comparison, values, comparison.contrasts, results.noise)
    held_out = scores_of(values, HELD_OUT, comparison.metric)
    if held_out and comparison.contrasts:
        noise = pooled_noise(held_out)
        same = _tested(comparison, values, comparison.contrasts, noise, HELD_OUT)
        shown = ['difference', 'pooled_low', 'pooled_high', 'finding']
        frame = frame.join(same[shown].add_prefix('held_out_'))
    return frame


def _tested(
    comparison: Comparison,
    values: pd.DataFrame,
    names: Sequence[str],
    noise: tuple[float, int],
    split: str = TEST,
) -> pd.DataFrame:
    """Contrasts with p and p of equality, each corrected by Holm's method, and their findings."""
    scores, margin, lines = scores_of(values, split, comparison.metric), comparison.margin, {}
    for name in names:
        difference, known = _differ(scores, name, noise)
        finished = difference.pairs == len(comparison.seeds)  # less is a look ahead
        equal = math.nan if margin is None else equivalence(known, margin)
        lines[name] = {
            **_fields(difference, 'pairs', 'mean', 'low', 'high'),
            **_fields(known, 'low', 'high', 'p', 'noise', prefix='pooled_'),
            'p': known.p if finished else math.nan,
            'p_equal': equal if finished else math.nan,
        }
    frame = pd.DataFrame.from_dict(lines, orient='index')
    if lines:
        for column in ('p', 'p_equal'):
            corrected = holm(frame[column].to_dict(), len(lines))
            frame[f'{column}_holm'] = pd.Series(corrected, dtype=float)
        frame['finding'] = frame.apply(_word, axis=1, margin=margin)
    return frame


def _differ(scores: Scores, contrast: str, noise: tuple[float, int]) -> tuple[Difference, ...]:
    """The difference of a contrast by its own pairs, and by a noise that is known better."""
    difference = paired_difference(*(scores.get(name, {}) for name in pair_of(contrast)))
    return difference, with_noise(difference, *noise)


def forest(found: Mapping[str, Made], further: Iterable[str] = ()) -> pd.DataFrame:
    """Contrasts of comparisons by name, and what each says over all of them: a line each.

    Args:
        found: The comparisons. One counts for each contrast of which it has both rows, whether it
            names that contrast or not.
        further: Contrasts that none of them names.
    """
    named = (name for made in found.values() for name in made.comparison.contrasts)
    lines = []
    for contrast in dict.fromkeys((*named, *further)):
        of = {
            title: difference
            for title, (comparison, results, values) in found.items()
            for scores in [scores_of(values, TEST, comparison.metric)]
            for difference in [_differ(scores, contrast, results.noise)[1]]
            if difference.noise > 0
        }
        if len(of) < min(len(found), 2):  # the table of that comparison says as much
            continue
        lines += [
            {'contrast': contrast, 'comparison': title, **_fields(each, 'mean', 'low', 'high')}
            for title, each in of.items()
        ]
        if len(of) > 1:
            means = [each.mean for each in of.values()]
            variances = [each.noise**2 / each.pairs for each in of.values()]
            pooled = asdict(together(means, variances))
            pooled['difference'] = pooled.pop('mean')
            lines.append({'contrast': contrast, 'comparison': TOGETHER, **pooled})
    columns = ['contrast', 'comparison', 'difference', 'low', 'high', *PREDICTED, 'heterogeneity']
    return pd.DataFrame(lines, columns=columns)


def _fields(found: Difference | None, *names: str, prefix: str = '') -> dict[str, float]:
    return {
        f'{prefix}{"difference" if name == "mean" else name}': getattr(found, name, math.nan)
        for name in names
    }


def _word(contrast: pd.Series, margin: float | None) -> str:
    if contrast['p_holm'] < LEVEL:
        return 'better' if contrast['difference'] > 0 else 'worse'
    return f'equal within {margin:g}' if contrast['p_equal_holm'] < LEVEL else 'open'


def summary(comparison: Comparison, results: Results, values: pd.DataFrame) -> pd.DataFrame:
    """One line for each row that has results, all numbers unrounded."""
    scores = scores_of(values, TEST, comparison.metric)
    if not scores:
        raise ValueError(f'no run of {comparison.name} can be used{results.why_none}')
    found, held_out = compared(comparison, values), compared(comparison, values, HELD_OUT)
    of_held_out = ('mean', 'low', 'high') if held_out else ()
    images, lines = _over_images(comparison, results), {}
    for row, of_row in scores.items():
        own, score = found.get(row), pd.Series(of_row)
        contents = [c for (name, _), c in results.usable.items() if name == row]
        first = contents[0]
        clock = 'cpu_minutes' if first['device'] == 'cpu' else 'minutes'
        noisy = own and with_noise(own, *results.noise)
        low, high = images.get(row, (math.nan, math.nan))
        # times of different machines are no mean
        one = len({c['hardware'] for c in contents}) == 1
        lines[row] = {
            **{'seeds': len(contents), 'score': score.mean(), 'std': score.std()},
            **_fields(own, 'pairs', 'mean', 'low', 'high', 'p'),
            **_fields(own, 'std', prefix='difference_'),
            **_fields(own, 'freedom'),
            **_fields(noisy, 'low', 'high', 'p', prefix='pooled_'),
            **_fields(held_out.get(row), *of_held_out, prefix='held_out_'),
            **{'images_low': low, 'images_high': high},
            **{name: first[name] for name in ('params', 'active_params', 'macs', 'images')},
            'minutes': pd.Series([c[clock] for c in contents]).mean() if one else math.nan,
            **{name: of_layers(values, TEST, of, [row])[0] for name, of in LAYERS.items()},
            **{
                name: as_cell(', '.join(sorted({c[name] for c in contents})))
                for name in ('device', 'hardware', 'commit')
            },
        }
    frame = pd.DataFrame.from_dict(lines, orient='index')
    for name in comparison.also:
        _add_further(frame, name, values, comparison)
    if comparison.reference in frame.index:
        compute = frame['macs'] * frame['images']
        frame['unequal_compute'] = (compute / compute[comparison.reference] - 1).abs() > UNEQUAL
    return frame


def _over_images(comparison: Comparison, results: Results) -> dict[str, tuple[float, float]]:
    """Of rows that have kept which images they got right, and accuracy as their metric."""
    bits: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for (row, seed), content in results.usable.items():
        if content.get('correct') and comparison.metric == 'accuracy/top1':
            with _naming_file(row, seed):
                packed = np.frombuffer(b64decode(content['correct']), np.uint8)
                bits[row][seed] = np.unpackbits(packed, count=content['data']['test']['samples'])
    base = bits.pop(comparison.reference, {})
    return {row: over_images(of_row, base) for row, of_row in bits.items()}


def _add_further(
    frame: pd.DataFrame, name: str, values: pd.DataFrame, comparison: Comparison
) -> None:
    """Mean and standard deviation of a number of the test, or means of each layer that has it."""
    known = sorted(set(values.loc[values['split'] == TEST, 'name']))
    # a row without results may still have it
    may = len(frame) < len(comparison.rows) or any(name in (k, k.rpartition('/')[2]) for k in known)
    check(may, 'also', name, f'a number of the tests, {", ".join(known)}')
    scores = scores_of(values, TEST, name)
    if not scores:
        frame[name] = of_layers(values, TEST, name, frame.index)
        return
    columns = [pd.Series(scores.get(row, {}), dtype=float) for row in frame.index]
    frame[name] = [column.mean() for column in columns]
    frame[f'{name}_std'] = [column.std() for column in columns]


def of_layers(
    values: pd.DataFrame, split: str, name: str, rows: Iterable[str]
) -> list[list[float]]:
    """A statistic of each layer as mean over seeds, in the order of layers, for each row."""
    of = values[(values['split'] == split) & values['name'].str.endswith(f'/{name}')]
    found = {row: list[float]() for row in rows}
    of = of.assign(length=of['name'].str.len())  # blocks.2 before blocks.10
    for (row, _, _), each in of.groupby(['row', 'length', 'name'])['value']:
        if row in found:
            found[row].append(float(each.mean(skipna=False)))
    return [*found.values()]
