"""Checkpoint files of V-MoE, github.com/google-research/vmoe: read as data, without JAX.

`NAME.index` has the tree, with the shape of each array and where its chunks are;
`NAME.data-00000-of-00008` and so on have the chunks. All are msgpack, and arrays in them are raw
bytes with a shape and the name of a type. Chunks know their array by its place among the leaves
of the tree, whose keys are sorted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor

from .compat import StateDict, shorten

# Types of V-MoE's msgpack; a tree of weights has no others.
_ARRAY, _SLICES, _LEAF = 1, 6, 8
_CHUNKS = '__msgpack_array_chunk_a87ca2__'  # the key that says that a map holds chunks
_VERSION = '20220622'
_PARAMS = 'params'  # of a whole state of a training; released files have the weights alone

# First and last index of a chunk in each dimension of its array.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Leaf:
    """What the index says of an array."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    shards: frozenset[int]


def read_tree(checkpoint: str) -> StateDict:
    """The weights of a checkpoint, by their path in the tree with slashes."""
    prefix = checkpoint.removesuffix('.index')
    count, leaves = _decoded(f'{prefix}.index', _index)
    wanted = _weights(leaves, checkpoint)
    parts: dict[int, list[tuple[Box, Tensor]]] = {place: [] for place in wanted}
    for shard in sorted({shard for place in wanted for shard in leaves[place][1].shards}):
        chunks = _decoded(f'{prefix}.data-{shard:05d}-of-{count:05d}', _chunks)
        for place in wanted:
            parts[place] += chunks.pop(place, [])
    return {
        name: _joined(name, leaves[place][1], parts.pop(place), checkpoint)
        for place, name in wanted.items()
    }


def _weights(leaves: list[tuple[str, _Leaf]], checkpoint: str) -> dict[int, str]:
    """Which leaves are weights, by their place, and their names from there on."""
    roots = {name.partition('/')[0] for name, _ in leaves}
    if _PARAMS not in roots:
        return {place: name for place, (name, _) in enumerate(leaves)}
    prefix = f'{_PARAMS}/'
    return {
        place: name.removeprefix(prefix)
        for place, (name, _) in enumerate(leaves)
        if name.startswith(prefix)
    }


def _joined(name: str, leaf: _Leaf, parts: list[tuple[Box, Tensor]], checkpoint: str) -> Tensor:
    boxes = dict(parts)  # what several processes had is the same
    found, size = sum(chunk.numel() for chunk in boxes.values()), math.prod(leaf.shape)
    fits = all(
        chunk.dtype == leaf.dtype
        and len(box) == len(leaf.shape)
        and all(0 <= a <= b <= length for (a, b), length in zip(box, leaf.shape, strict=True))
        for box, chunk in boxes.items()
    )
    if found != size or not fits:
        raise ValueError(
            f'checkpoint {checkpoint!r} is incomplete or damaged: of {name}, {leaf.shape} '
            f'{leaf.dtype}, the files have {found} of {size} values'
            + ('' if fits else ', and chunks that do not lie in it')
        )
    array = torch.empty(leaf.shape, dtype=leaf.dtype)
    if leaf.dtype.is_floating_point:
        array.fill_(math.nan)  # where chunks overlap others are missing, and nan is refused later
    for box, chunk in boxes.items():
        array[tuple(slice(a, b) for a, b in box)] = chunk
    return array


def _decoded(path: str, decode: Callable[[Any], Any]) -> Any:
    """What a file says, or one line about what is wrong with it."""
    if not Path(path).is_file():
        raise ValueError(
            f'{path!r} does not exist; a checkpoint of V-MoE is a file NAME.index and all files '
            'NAME.data-NNNNN-of-NNNNN beside it, and is called by NAME'
        )
    try:
        return decode(msgpack.unpackb(Path(path).read_bytes(), ext_hook=_extension))
    except Exception as error:  # bytes can fail in any way
        raise ValueError(
            f'{path!r} is truncated or damaged, or no file of V-MoE: {error}'
        ) from error


def _index(content: Any) -> tuple[int, list[tuple[str, _Leaf]]]:
    count, tree, version = (content.get(key) for key in ('shard_count', 'index', 'version'))
    if type(count) is not int or not isinstance(tree, dict):
        raise ValueError(f"it has {shorten(map(str, content))}, for 'index' and 'shard_count'")
    if version not in (None, _VERSION):
        raise ValueError(f'it is of version {version!r}, for {_VERSION!r} or none')
    leaves = list(_flat(tree))
    # the fields of a training's state were not sorted before there were versions
    if version is None and _PARAMS in tree and len(tree) > 1:
        raise ValueError(
            f'it is of a training before {_VERSION} and has {shorten(tree)}, whose order no file '
            'says; one of weights alone, or of a later training, would fit'
        )
    return count, leaves


def _flat(tree: dict[str, Any], prefix: str = '') -> Iterator[tuple[str, _Leaf]]:
    for key in sorted(tree):
        value, name = tree[key], f'{prefix}{key}'
        if isinstance(value, dict):
            yield from _flat(value, f'{name}/')
        elif isinstance(value, _Leaf):
            yield name, value
        elif value is not None:  # what JAX counts as no leaf either
            raise ValueError(f'{name} is no array')


def _chunks(content: Any) -> dict[int, list[tuple[Box, Tensor]]]:
    """Chunks by the place of their array."""
    if content.pop(_CHUNKS, None) is not True:
        raise ValueError('it has no chunks of arrays')
    found = {}
    for place, chunks in content.items():
        found[int(place)] = [
            (box, torch.cat(pieces).reshape([stop - start for start, stop in box]))
            for pieces, box in chunks
        ]
    return found


def _extension(code: int, data: bytes) -> Any:
    if code not in (_ARRAY, _SLICES, _LEAF):
        raise ValueError(f'type {code} of msgpack is none of weights')
    content = msgpack.unpackb(data, raw=True)
    if code == _SLICES:
        return _box(content)
    if code == _ARRAY:
        shape, dtype, values = content
        # torch wants bytes that may be written to
        return torch.frombuffer(bytearray(values), dtype=_dtype(dtype)).reshape(shape)
    described, _, shards = content
    shape, dtype, *_ = msgpack.unpackb(described, raw=True)
    return _Leaf(tuple(shape), _dtype(dtype), frozenset(shards))


def _box(slices: list[bytes]) -> Box:
    bounds = [msgpack.unpackb(data)[:2] for data in slices]
    return tuple((start, stop) for start, stop in bounds)


def _dtype(name: bytes) -> torch.dtype:
    dtype = getattr(torch, name.decode(), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f'torch has no type {name.decode()!r}')
    return dtype
