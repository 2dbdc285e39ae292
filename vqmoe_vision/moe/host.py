"""What a layer may know of the model it stands in, and what reads images for layers.

Legend: B images, L patches, F raw features of a patch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .repeated import in_recomputation

# images (B, channels, height, width), grid of patches (rows, columns) -> (B, L, F)
ReadPatches = Callable[[Tensor, tuple[int, int]], Tensor]
# Where what reads images by a network stands in a model, and the network in that.
READER, NETWORK = 'patch_embed.reader.', 'network.'


class RawPatches:
    """Raw patches of a pass's images, from a model's stem to its layers: data, never a graph."""

    def __init__(self, read: ReadPatches | None = None) -> None:
        self.read = read
        self.shown = 0  # batches, but for those of a compiled stem
        self._of_thread = _OfThread()  # each sees the images of its own
        self._last: Tensor | None = None
        self._of_graph: Tensor | None = None  # which cannot tell threads apart

    @property
    def value(self) -> Tensor | None:
        """(B, L, F), or what else a method makes of B images; None before the first pass."""
        if self._of_graph is not None:
            return self._of_graph
        if torch.compiler.is_compiling():
            return self._last
        now = self._of_thread
        # what is repeated was shown in the thread of its pass, and backward may run in another
        elsewhere = now.value is None or (in_recomputation() and not now.restored)
        return self._last if elsewhere else now.value

    @value.setter
    def value(self, value: Tensor | None) -> None:
        if torch.compiler.is_compiling():
            self._of_graph = value
        else:
            self._of_thread.value = self._last = value
            self._of_graph = None

    def current(self) -> Tensor:
        """The `value` of a pass that is under way."""
        if self.value is None:
            raise RuntimeError(
                'a layer that decides by the raw image was shown none: that does the stem of the '
                'model which the layer was built in, so copy and use that model as a whole'
            )
        return self.value

    def check_number(self, name: str, found: int, shown: int) -> None:
        """Refuse another number than of the images shown last: that it is them, nobody can tell."""
        if torch.jit.is_tracing() or found == shown:  # traced sizes are tensors
            return
        raise ValueError(
            f'{name}={found} is not possible: {shown}, as those of the images that the stem saw '
            'last, by which the method decides; call the model as a whole'
        )

    @property
    def restored(self) -> bool:
        """Whether `value` is, now, that of the pass which gradient checkpointing repeats."""
        return self._of_thread.restored

    def show(self, images: Tensor, grid_size: tuple[int, int]) -> None:
        """Read the patches of the images that the model looks at now."""
        assert self.read is not None
        value = self.read(images, grid_size)
        if in_recomputation() and _equal(value, self.value):
            return  # whoever checkpoints a whole model repeats its stem too
        self.value = value
        if not torch.compiler.is_compiling():  # or every number would be compiled for
            self.shown += 1

    @contextmanager
    def restoring(self, value: Tensor | None) -> Iterator[None]:
        """Context in which a part of an earlier pass, with this `value`, is repeated."""
        now = self._of_thread
        before = now.value, self._last, self._of_graph
        self.value, now.restored = value, True
        try:
            yield
        finally:
            now.value, self._last, self._of_graph = before
            now.restored = False

    def __getstate__(self) -> dict[str, Any]:
        return {'read': self.read}

    def __setstate__(self, state: dict[str, Any]) -> None:
        RawPatches.__init__(self, state['read'])


class _OfThread(threading.local):
    value: Tensor | None = None
    restored = False


def _equal(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)


@dataclass(frozen=True)
class Host:
    """The model around a layer, as it is when the layer is built."""

    num_tokens: int  # per image, prefix tokens included
    num_prefix_tokens: int = 0  # class, registers
    in_chans: int = 3
    # what a method's `read_patches` made of the images; empty without one
    raw_patches: RawPatches = field(default_factory=RawPatches)


class ImageReader(nn.Module):
    """Base of `ReadPatches` by a frozen network, which somebody has to train before."""

    network: Any  # buffers alone, as no training changes it

    def features(self, images: Tensor) -> Tensor:
        """Features (B, F) float32 of normalised images, without graph."""
        raise NotImplementedError

    def fit(self, features: Tensor) -> Any:
        """Take over what features of a training set say."""
        raise NotImplementedError

    def expected(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What its part of a state dict has to have in order to be loaded, with any values."""
        raise NotImplementedError

    def adapted(
        self,
        own: dict[str, Tensor],
        others: dict[str, Tensor],
        path: str,
        image_sizes: Sequence[tuple[int, int]],
    ) -> tuple[dict[str, Tensor], Any]:
        """What it loads of a checkpoint, of its own part or all others, and the report of it."""
        raise NotImplementedError

    def before_start(self, features: str | None, started: bool, weights: Any) -> Any:
        """Reads a file for its network before a new training; gives how images are normalised."""
        raise NotImplementedError

    def before_training(self, runner: Any) -> None:
        """Is fitted to the training set of a run."""
        raise NotImplementedError


def image_reader(model: nn.Module) -> ImageReader | None:
    """What reads images by a network in a model; None if nothing does."""
    return next((part for part in model.modules() if isinstance(part, ImageReader)), None)
