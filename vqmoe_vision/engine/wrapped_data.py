"""Data sets inside others, as mmengine's wrappers hold them."""

from collections.abc import Iterator

from mmengine.config import ConfigDict


def innermost(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """The data sets that are no wrappers, in order."""
    found = [dataset.get('dataset'), *(dataset.get('datasets') or [])]
    wrapped = [inner for inner in found if isinstance(inner, dict)]
    if not wrapped:
        yield dataset
    for inner in wrapped:
        yield from innermost(inner)
