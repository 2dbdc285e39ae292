"""How numbers are written in tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .statistics import Difference


def number(value: float) -> str:
    """Two digits; a dash for nan."""
    return '-' if math.isnan(value) else f'{value:.2f}'


def spread(mean: float, deviation: float) -> str:
    """Mean and standard deviation, which is left out if it is nan; a dash without a mean."""
    return number(mean) + ('' if math.isnan(deviation) else f' ± {deviation:.2f}')


def p_value(value: float) -> str:
    """Three digits; a dash for nan."""
    if math.isnan(value):
        return '-'
    return '<0.001' if value < 0.001 else f'{value:.3f}'


def interval(difference: Difference | None) -> str:
    """A mean and its interval as a cell: '+1.00 (+0.50 to +1.50)'; a dash without a pair."""
    if difference is None or math.isnan(difference.mean):
        return '-'
    if math.isnan(difference.low):
        return f'{difference.mean:+.2f}'
    return f'{difference.mean:+.2f} ({ends(difference)})'


def ends(difference: Difference) -> str:
    """The interval alone: '+0.50 to +1.50'."""
    return f'{difference.low:+.2f} to {difference.high:+.2f}'


def layers(values: Sequence[float]) -> str:
    """A number of each layer; a dash without layers."""
    return ' / '.join(f'{value:.2f}'.rstrip('0').rstrip('.') for value in values) or '-'
