"""How numbers are written in tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .statistics import Difference


def number(value: float) -> str:
    """Two digits; a dash for nan."""
    return '-' if math.isnan(value) else f'{value:.2f}'


def spread(mean: float, deviation: float) -> str:
    """A mean and the standard deviation; nan of the latter is left out."""
    return number(mean) + ('' if math.isnan(deviation) else f' ± {deviation:.2f}')


def p_value(value: float) -> str:
    """Three digits; a dash for nan."""
    if math.isnan(value):
        return '-'
    return '<0.001' if value < 0.001 else f'{value:.3f}'


def interval(difference: Difference | None, seeds: int) -> str:
    """A mean and its interval as a cell: '+1.00 (+0.50 to +1.50), 2 pairs'."""
    if difference is None or math.isnan(difference.mean):
        return '-'
    mean, pairs = f'{difference.mean:+.2f}', difference.pairs
    told = '' if pairs == seeds else f', {pairs} {"pairs" if pairs > 1 else "pair"}'
    return (mean if math.isnan(difference.low) else f'{mean} ({ends(difference)})') + told


def ends(difference: Difference) -> str:
    """The interval alone: '+0.50 to +1.50'."""
    return f'{difference.low:+.2f} to {difference.high:+.2f}'


def layers(values: Sequence[float]) -> str:
    """A number of each layer, in their order; a dash for nan, and for none."""
    return ' / '.join(number(value).rstrip('0').rstrip('.') for value in values) or '-'
