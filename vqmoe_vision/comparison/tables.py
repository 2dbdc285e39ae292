"""Tables of a comparison: all numbers as a frame, and what a reader sees of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from vqmoe_vision.models.create import options_in_full
from vqmoe_vision.moe import METHODS

from . import cells
from .outcome import Outcome
from .results import images_seen, layer_means
from .shifts import shifted_layers

UNEQUAL = 0.05  # share of the reference's compute
_MARK = '*'
_HELD_OUT = 'the same on held-out images'


def frame_of(outcome: Outcome) -> pd.DataFrame:
    """One line for each row that has results, all numbers unrounded."""
    comparison, by_row = outcome.comparison, outcome.by_row
    if not by_row.keys() & outcome.wanted:  # the reference alone would be no answer
        raise ValueError(f'no run of {comparison.name} can be used{outcome.results.why_none}')
    rows, differences = list(by_row), outcome.differences
    lines = [
        _line(contents, outcome.scores[row]) | _also(comparison.also, contents)
        for row, contents in by_row.items()
    ]
    frame = pd.DataFrame(lines, index=rows)
    for field in ('pairs', 'mean', 'low', 'high', 'p', 'std', 'noise', 'freedom'):
        name = {'mean': 'difference', 'std': 'difference_std'}.get(field, field)
        frame[name] = [getattr(differences.get(row), field, math.nan) for row in rows]
    frame['p_holm'] = [outcome.corrected.get(row, math.nan) for row in rows]
    if held_out := outcome.held_out_differences:
        for field in ('mean', 'low', 'high'):
            name = f'held_out_{"difference" if field == "mean" else field}'
            frame[name] = [getattr(held_out.get(row), field, math.nan) for row in rows]
    for name in comparison.also:
        if not outcome.may_have(name):
            known = ', '.join(sorted(by_row[rows[0]][0]['test']))
            raise ValueError(f'also: {name!r} is no number of the tests; those are {known}')
    if comparison.reference in rows:
        compute = frame.macs * frame.images
        compute /= compute[comparison.reference]
        frame['unequal_compute'] = (compute - 1).abs() > UNEQUAL
    return frame


def shown(outcome: Outcome, frame: pd.DataFrame) -> pd.DataFrame:
    """The frame as a reader sees it, rounded and with units."""
    comparison, planned = outcome.comparison, len(outcome.comparison.seeds)
    unequal = frame.get('unequal_compute', pd.Series(False, frame.index))
    differences = [outcome.differences.get(row) for row in frame.index]
    held_out = [outcome.held_out_differences.get(row) for row in frame.index]
    columns = {
        'row': [f'{row}{_MARK if unequal[row] else ""}' for row in frame.index],
        comparison.metric: frame.score.map(cells.number),
        'std': frame['std'].map(cells.number),
        'seeds': [f'{n}' if n == planned else f'{n} of {planned}' for n in frame.seeds],
        f'difference to {comparison.reference} (95 % interval)': map(
            cells.interval, differences, frame.seeds
        ),
        'p (Holm)': frame.p_holm.map(cells.p_value),
        _HELD_OUT: map(cells.interval, held_out, frame.seeds),
        'parameters, M: all / active': frame.apply(
            lambda line: f'{line.params / 1e6:.2f} / {line.active_params / 1e6:.2f}', axis=1
        ),
        'MACs, M': frame.macs.map(lambda macs: f'{macs / 1e6:.1f}'),
        'minutes': frame.minutes.map('{:.1f}'.format),
        'unused experts': frame.unused_experts.map(cells.layers),
        'load perplexity': frame.load_perplexity.map(cells.layers),
        'code perplexity': frame.code_perplexity.map(cells.layers),
    }
    for name in comparison.also:
        deviations = frame.get(f'{name}_std', pd.Series(math.nan, frame.index))
        columns[name] = map(_mean, frame[name], deviations)
    if len(outcome.machines) > 1:
        del columns['minutes']  # times of different machines are not compared
    if not any(held_out):
        del columns[_HELD_OUT]
    return pd.DataFrame({name: list(column) for name, column in columns.items()})


def shift_table(outcome: Outcome) -> pd.DataFrame:
    """Scores under shifts, for each row and shift that was measured."""
    comparison, lines = outcome.comparison, []
    errors = shifted_layers(comparison, outcome.results, 'quantization_error')
    to_reference = f'difference to {comparison.reference} (95 % interval)'
    differences = outcome.shifted_differences, outcome.left_differences
    for name, by_row in outcome.shifted.items():
        for row in filter(by_row.__contains__, outcome.rows):
            column = pd.Series(by_row[row])
            left = pd.Series(outcome.left[name][row], dtype=float)
            intervals = [cells.interval(each[name].get(row), len(column)) for each in differences]
            lines.append(
                {
                    'shift': name,
                    'row': row,
                    comparison.metric: cells.number(column.mean()),
                    'std': cells.number(column.std()),
                    'seeds': str(len(column)),
                    to_reference: intervals[0],
                    'left, %': cells.number(left.mean()),
                    f'its {to_reference}': intervals[1],
                }
            )
            if errors:  # of a row without codes, a dash
                measured = errors.get(name, {}).get(row, [])
                same = [c for c in outcome.by_row[row] if name in c.get('shift_routing', {})]
                trained = layer_means(_tests(same), 'quantization_error') if measured else []
                lines[-1]['quantization error'] = cells.layers(measured)
                lines[-1]['as trained'] = cells.layers(trained)
    return pd.DataFrame(lines)


def notes(outcome: Outcome, frame: pd.DataFrame) -> list[str]:
    """What a reader of the table must know."""
    comparison = outcome.comparison
    if comparison.tested:
        of, images = 'test', 'of the last checkpoint on the test data'
    else:
        of, images = 'validation', 'at the end of training on held-out data; no test data was seen'
    lines = [
        f'{comparison.metric} {images}. Differences are paired by '
        f'seed; intervals are those of {_test(outcome)} for one comparison, without correction; p '
        f'is corrected for all {outcome.planned} rows that are planned beside the reference, by '
        f'the method of Holm, and is given once a row has all {len(comparison.seeds)} seeds. Seeds '
        '"tell" a difference that they would find with 80 % power at the 5 % level after that '
        'correction. Unused experts and perplexities of the load and of codes are those of the '
        f'{of} pass, by layer.'
    ]
    if outcome.held_out_differences:
        lines.append(
            f'{_HELD_OUT.capitalize()}: those that training validates on, and that choose no '
            'checkpoint. What they do not show as well may be of the test images alone.'
        )
    lines += _said_of_compute(comparison.reference, frame)
    if beside := [row for row, contents in outcome.by_row.items() if _needs_features(contents[0])]:
        lines.append(
            f'{", ".join(beside)}: the frozen network whose features decide is in the '
            'multiply-accumulates, and its weights are not in the parameters.'
        )
    machines = outcome.machines
    if len(machines) > 1:
        lines.append(f'Times are left out, because machines differ: {"; ".join(machines)}.')
    else:
        kind = 'processor time' if (frame.device == 'cpu').all() else 'wall-clock time'
        lines.append(f'Minutes are {kind} of training: {machines[0]}.')
    modified = [
        f'{row}-seed{content["seed"]} ({content["commit"]})'
        for row, contents in outcome.by_row.items()
        for content in contents
        if '+' in content['commit']
    ]
    if modified:
        lines.append(
            'Trained by a checkout whose files differed from their commit, which + marks: '
            f'{", ".join(modified)}.'
        )
    return lines


def _test(outcome: Outcome) -> str:
    noise, freedom = outcome.noise
    if not outcome.screens or not freedom:
        return 'the paired t-test'
    degrees = 'degree' if freedom == 1 else 'degrees'
    return (
        f'a t-test with the noise of all rows that are finished ({noise:.2f} a pair, {freedom} '
        f'{degrees} of freedom), because so few seeds do not tell that of one row,'
    )


def _said_of_compute(reference: str, frame: pd.DataFrame) -> list[str]:
    """What a star marks, and which rows are trained on more or fewer images than the reference."""
    if reference not in frame.index:
        return []
    lines, images = [], frame.images[reference]
    others = frame.images[frame.images != images]
    if frame.unequal_compute.any():
        what = 'its multiply-accumulates differ'
        if not others.empty:
            what = 'multiply-accumulates of an image times images seen in training differ'
        lines.append(
            f'{_MARK} does not have the compute of {reference}: {what} by more than {UNEQUAL:.0%}.'
        )
    if not others.empty:
        seen = ', '.join(f'{row} {count:,}' for row, count in others.items())
        lines.append(f'Images seen in training, repeated ones too: {reference} {images:,}, {seen}.')
    return lines


def _needs_features(content: dict[str, Any]) -> bool:
    model = content['config']['model']
    options = options_in_full(model.get('backbone', model))
    return bool(options) and METHODS[options['method']].needs_features


def _also(names: Sequence[str], contents: list[dict[str, Any]]) -> dict[str, Any]:
    """Further numbers of a row: mean and standard deviation, or means by layer."""
    found: dict[str, Any] = {}
    for name in names:
        values = pd.Series([c['test'][name] for c in contents if name in c['test']], dtype=float)
        if values.empty:
            found[name] = layer_means(_tests(contents), name)
        else:
            found |= {name: values.mean(), f'{name}_std': values.std()}
    return found


def _line(contents: list[dict[str, Any]], scores: dict[int, float]) -> dict[str, Any]:
    first = contents[0]
    clock = 'cpu_minutes' if first['device'] == 'cpu' else 'minutes'
    values, machines = pd.Series(scores), sorted({content['hardware'] for content in contents})
    minutes = sum(content[clock] for content in contents) / len(contents)
    return {
        'seeds': len(values),
        'score': values.mean(),
        'std': values.std(),
        'params': first['params'],
        'active_params': first['active_params'],
        'macs': first['macs'],
        'images': images_seen(first),
        'minutes': minutes if len(machines) == 1 else math.nan,
        'unused_experts': layer_means(_tests(contents), 'load_unused'),
        'load_perplexity': layer_means(_tests(contents), 'load_perplexity'),
        'code_perplexity': layer_means(_tests(contents), 'code_usage_perplexity'),
        'device': ', '.join(sorted({content['device'] for content in contents})),
        'hardware': ', '.join(machines),
        'commits': ', '.join(sorted({content['commit'] for content in contents})),
        'command': first['command'],
    }


def _tests(contents: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [content['test'] for content in contents]


def _mean(value: float | list[float], deviation: float) -> str:
    if isinstance(value, list):
        return cells.layers(value)
    return cells.spread(value, deviation)
