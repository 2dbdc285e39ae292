"""What a layer may know of the model it stands in.

Legend: B images, L patches, F raw features of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ReadPatches = Callable[[Tensor, tuple[int, int]], Tensor]


class RawPatches:
    """Raw patches of the images that a model is looking at, handed from its stem to its layers.

    Holds plain data, never a graph: a decision by the raw image must not depend on anything learned
    before it. Copies and pickles of a model start empty.

    Args:
        read: Makes them of images (B, channels, height, width) and the grid of patches (rows,
            columns).

    Attributes:
        value: (B, L, F), or what else a method makes of B images; None before the first pass.
        shown: How many batches of images were shown, but for those of a compiled stem.
        restored: Whether `value` is, now, that of the pass which gradient checkpointing repeats.
    """

    def __init__(self, read: ReadPatches | None = None) -> None:
        self.read = read
        self.value: Tensor | None = None
        self.shown = 0
        self.restored = False

    def show(self, images: Tensor, grid_size: tuple[int, int]) -> None:
        """Read the patches of the images that the model looks at now.

        Args:
            images: (B, channels, height, width).
            grid_size: Rows and columns of patches.
        """
        assert self.read is not None
        self.value = self.read(images, grid_size)
        if not torch.compiler.is_compiling():  # or every number would be compiled for
            self.shown += 1

    @contextmanager
    def restoring(self, value: Tensor | None) -> Iterator[None]:
        """Context in which a part of an earlier pass is repeated.

        Args:
            value: The `value` of that pass.
        """
        self.value, self.restored = value, True
        try:
            yield
        finally:
            self.restored = False

    def __getstate__(self) -> dict[str, Any]:
        return {'read': self.read, 'value': None, 'shown': 0, 'restored': False}


@dataclass(frozen=True)
class Host:
    """The model around a layer, as it is when the layer is built.

    Args:
        num_tokens: Tokens per image, prefix tokens included.
        num_prefix_tokens: Tokens before the patches (class, registers).
        in_chans: Image channels.
        raw_patches: Where a method finds what its `read_patches` made of the images; empty for a
            method without one.
    """

    num_tokens: int
    num_prefix_tokens: int = 0
    in_chans: int = 3
    raw_patches: RawPatches = field(default_factory=RawPatches)
