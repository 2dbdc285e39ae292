"""Data sets inside others, as mmengine's and torch's wrappers hold them."""

from collections.abc import Iterator
from typing import Any


def inside(dataset: Any) -> list[Any]:
    """What a wrapper wraps.

    Args:
        dataset: A data set, or the config of one.

    Returns:
        Empty for a data set that is no wrapper.
    """
    found = [getattr(dataset, name, ()) for name in ('dataset', 'datasets')]
    return [inner for one in found for inner in (one if isinstance(one, list | tuple) else [one])]


def innermost(dataset: Any) -> Iterator[Any]:
    """The data sets that are no wrappers, in order.

    Args:
        dataset: A data set, or the config of one.
    """
    wrapped = inside(dataset)
    if not wrapped:
        yield dataset
    for inner in wrapped:
        yield from innermost(inner)
