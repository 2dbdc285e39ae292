"""Tables of a comparison: all numbers as a frame, and what a reader sees of it."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from .results import Results
from .shifts import shifted_layers, shifted_scores
from .spec import Comparison
from .statistics import holm, paired_difference

UNEQUAL = 0.05  # share of the reference's multiply-accumulates
_MARK = '*'


def frame_of(comparison: Comparison, results: Results) -> pd.DataFrame:
    """One line for each row that has results, all numbers unrounded.

    Args:
        comparison: What was compared.
        results: What is there of it.

    Raises:
        ValueError: No run is there, or none has a number that the comparison names.
    """
    by_row = _by_row(results)
    if not by_row:
        kept = '; '.join(f'{name}: {why}' for name, why in results.left_out.items())
        raise ValueError(
            f'no run of {comparison.name} can be used'
            + (f' ({kept})' if kept else ': none is finished, tools/compare.py run trains them')
        )
    rows = [row for row in comparison.rows if row in by_row]
    scores = scores_of(comparison, results)
    reference = scores.get(comparison.reference, {})
    differences = {
        row: paired_difference(scores[row], reference)
        for row in rows
        if row != comparison.reference
    }
    corrected = dict(zip(differences, holm([d.p for d in differences.values()]), strict=True))
    lines = [_line(by_row[row], scores[row]) | _also(comparison, by_row[row]) for row in rows]
    frame = pd.DataFrame(lines, index=rows)
    for field in ('pairs', 'mean', 'low', 'high', 'p', 'std'):
        name = {'mean': 'difference', 'std': 'difference_std'}.get(field, field)
        frame[name] = [getattr(differences.get(row), field, math.nan) for row in rows]
    frame['p_holm'] = [corrected.get(row, math.nan) for row in rows]
    for name in comparison.also:
        if all(isinstance(value, list) and not value for value in frame[name]):
            known = ', '.join(sorted(by_row[rows[0]][0]['test']))
            raise ValueError(f'also: {name!r} is no number of the tests; those are {known}')
    if comparison.reference in rows:
        macs = frame.macs / frame.macs[comparison.reference]
        frame['unequal_compute'] = (macs - 1).abs() > UNEQUAL
    return frame


def scores_of(comparison: Comparison, results: Results) -> dict[str, dict[int, float]]:
    """The metric by row and seed.

    Args:
        comparison: Names the metric.
        results: Its finished runs.
    """
    return {
        row: {content['seed']: content['test'][comparison.metric] for content in contents}
        for row, contents in _by_row(results).items()
    }


def layer_means(contents: list[dict[str, Any]], name: str) -> list[float]:
    """A statistic of each layer, in the order of layers, as mean over runs.

    Args:
        contents: Of files of one row.
        name: What stands after the layer's name.
    """
    found = {}
    for metric in contents[0]['test']:
        if metric.rpartition('/')[2] == name:
            found[metric] = sum(content['test'][metric] for content in contents) / len(contents)
    return list(found.values())


def shown(comparison: Comparison, frame: pd.DataFrame) -> pd.DataFrame:
    """The frame as a reader sees it, rounded and with units.

    Args:
        comparison: What was compared.
        frame: As `frame_of`.
    """
    unequal = frame.get('unequal_compute', pd.Series(False, frame.index))
    columns = {
        'row': [f'{row}{_MARK if unequal[row] else ""}' for row in frame.index],
        comparison.metric: frame.score.map('{:.2f}'.format),
        'std': frame['std'].map(_number),
        'seeds': frame.seeds.map('{:.0f}'.format),
        f'difference to {comparison.reference} (95 % interval)': list(
            map(_interval, frame.difference, frame.low, frame.high)
        ),
        'p (Holm)': frame.p_holm.map(_p),
        'parameters, M: all / active': frame.apply(
            lambda line: f'{line.params / 1e6:.2f} / {line.active_params / 1e6:.2f}', axis=1
        ),
        'MACs, M': frame.macs.map(lambda macs: f'{macs / 1e6:.1f}'),
        'minutes': frame.minutes.map('{:.1f}'.format),
        'unused experts': frame.unused_experts.map(_layers),
        'code perplexity': frame.code_perplexity.map(_layers),
    }
    for name in comparison.also:
        deviations = frame.get(f'{name}_std', pd.Series(math.nan, frame.index))
        columns[name] = list(map(_mean, frame[name], deviations))
    if frame.hardware.nunique() > 1:
        del columns['minutes']  # times of different machines are not compared
    return pd.DataFrame(columns)


def shift_table(comparison: Comparison, results: Results) -> pd.DataFrame:
    """Scores under shifts, for each row and shift that was measured.

    Args:
        comparison: What was compared.
        results: What is there of it.
    """
    lines = []
    errors = shifted_layers(comparison, results, 'quantization_error')
    contents = _by_row(results)
    for name, by_row in shifted_scores(comparison, results).items():
        reference = by_row.get(comparison.reference, {})
        for row, values in by_row.items():
            column, own = pd.Series(values), row == comparison.reference
            difference = paired_difference(values, {} if own else reference)
            interval = _interval(difference.mean, difference.low, difference.high)
            lines.append(
                {
                    'shift': name,
                    'row': row,
                    comparison.metric: f'{column.mean():.2f}',
                    'std': _number(column.std()),
                    'seeds': str(len(column)),
                    f'difference to {comparison.reference} (95 % interval)': interval,
                }
            )
            if errors:  # of a row without codes, or from before it was measured, a dash
                measured = errors.get(name, {}).get(row, [])
                trained = layer_means(contents[row], 'quantization_error') if measured else []
                lines[-1]['quantization error'] = _layers(measured)
                lines[-1]['as trained'] = _layers(trained)
    return pd.DataFrame(lines)


def notes(comparison: Comparison, frame: pd.DataFrame) -> list[str]:
    """What a reader of the table must know.

    Args:
        comparison: What was compared.
        frame: A row of the table for each of its rows.
    """
    if comparison.tested:
        of, images = 'test', 'of the last checkpoint on the test data'
    else:
        of, images = 'validation', 'at the end of training on held-out data; no test data was seen'
    lines = [
        f'{comparison.metric} {images}. Differences are paired by '
        'seed; intervals and p are those of the paired t-test, p corrected for the number of rows '
        'by the method of Holm. Seeds "tell" a difference that they would find with 80 % power '
        'at the 5 % level after that correction. Unused experts and code perplexity are those of '
        f'the {of} pass, by layer.'
    ]
    if frame.get('unequal_compute', pd.Series(False)).any():
        lines.append(
            f'{_MARK} does not have the compute of {comparison.reference}: its '
            f'multiply-accumulates differ by more than {UNEQUAL:.0%}.'
        )
    hardware = sorted(frame.hardware.unique())
    if len(hardware) > 1:
        lines.append(f'Times are left out, because machines differ: {"; ".join(hardware)}.')
    else:
        kind = 'processor time' if (frame.device == 'cpu').all() else 'wall-clock time'
        lines.append(f'Minutes are {kind} of training: {hardware[0]}.')
    return lines


def _by_row(results: Results) -> dict[str, list[dict[str, Any]]]:
    by_row: dict[str, list[dict[str, Any]]] = {}
    for (row, _), content in results.usable.items():
        by_row.setdefault(row, []).append(content)
    return by_row


def _also(comparison: Comparison, contents: list[dict[str, Any]]) -> dict[str, Any]:
    """Further numbers of a row: mean and standard deviation, or means by layer."""
    found: dict[str, Any] = {}
    for name in comparison.also:
        values = pd.Series([c['test'][name] for c in contents if name in c['test']], dtype=float)
        if values.empty:
            found[name] = layer_means(contents, name)
        else:
            found |= {name: values.mean(), f'{name}_std': values.std()}
    return found


def _line(contents: list[dict[str, Any]], scores: dict[int, float]) -> dict[str, Any]:
    first = contents[0]
    clock = 'cpu_minutes' if first['device'] == 'cpu' else 'minutes'
    values = pd.Series(scores)
    return {
        'seeds': len(values),
        'score': values.mean(),
        'std': values.std(),
        'params': first['params'],
        'active_params': first['active_params'],
        'macs': first['macs'],
        'minutes': sum(content[clock] for content in contents) / len(contents),
        'unused_experts': layer_means(contents, 'load_unused'),
        'code_perplexity': layer_means(contents, 'code_usage_perplexity'),
        'device': ', '.join(sorted({content['device'] for content in contents})),
        'hardware': ', '.join(sorted({content['hardware'] for content in contents})),
        'commits': ', '.join(sorted({content['commit'] for content in contents})),
        'command': first['command'],
    }


def _number(value: float) -> str:
    return '-' if math.isnan(value) else f'{value:.2f}'


def _p(value: float) -> str:
    if math.isnan(value):
        return '-'
    return '<0.001' if value < 0.001 else f'{value:.3f}'


def _interval(difference: float, low: float, high: float) -> str:
    if math.isnan(difference):
        return '-'
    if math.isnan(low):
        return f'{difference:+.2f}'
    return f'{difference:+.2f} ({low:+.2f} to {high:+.2f})'


def _mean(value: float | list[float], deviation: float) -> str:
    if isinstance(value, list):
        return _layers(value)
    return f'{value:.2f}' + ('' if math.isnan(deviation) else f' ± {deviation:.2f}')


def _layers(values: list[float]) -> str:
    return ' / '.join(f'{value:.2f}'.rstrip('0').rstrip('.') for value in values) or '-'
