"""What a layer may know of its model, and what holds while gradient checkpointing repeats it.

Checkpointing runs a layer again in the backward pass, and does not say of which forward pass; a
gradient does, by the hook that its pass left where the answer went out. Either may come first, but
both come in one backward pass.

Legend: B images, L patches, F raw features of a patch, N tokens, D width.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, register_notrace_module
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import check

# images (B, channels, height, width), grid of patches (rows, columns) -> (B, L, F)
ReadPatches = Callable[[Tensor, tuple[int, int]], Tensor]
# Where what reads images by a network stands in a model, and the network in that.
READER, NETWORK = 'patch_embed.reader.', 'network.'


class RawPatches:
    """Raw patches of a pass's images, from a model's stem to its layers: data, never a graph."""

    def __init__(self, read: ReadPatches | None = None, kept: bool = False) -> None:
        self.read: Any = read
        self.kept = kept  # whether checkpointed blocks keep those of their pass
        self.value: Tensor | None = None  # (B, L, F), or what else a method makes of B images
        self.shown = 0  # batches, but for those of a compiled stem
        self._thread: int | None = None

    def current(self) -> Tensor:
        """The `value` of a pass that is under way."""
        if self.value is None:
            raise RuntimeError(
                'a layer that decides by the raw image was shown none: that does the stem of the '
                'model which the layer was built in, so copy and use that model as a whole'
            )
        if not (torch.compiler.is_compiling() or in_recomputation()):
            here = self._thread in (None, threading.get_ident())
            check(here, 'thread', 'another', 'each needs a copy of a model that reads raw images')
        return self.value

    def check_number(self, name: str, found: int, shown: int) -> None:
        """Refuse another number than of the images shown last: that it is them, nobody can tell."""
        if not torch.jit.is_tracing() and found != shown:  # traced sizes are tensors
            allowed = f'{shown}, as those of the images that the stem saw; call the whole model'
            check(False, name, found, allowed)

    def show(self, images: Tensor, grid_size: tuple[int, int]) -> None:
        """Read the patches of the images that the model looks at now."""
        value, before = self.read(images, grid_size), self.value
        if in_recomputation() and before is not None and torch.equal(value, before):
            return  # whoever checkpoints a whole model repeats its stem too
        self.value = value
        if not torch.compiler.is_compiling():  # or every number would be compiled for
            self.shown += 1
            self._thread = threading.get_ident()

    def __getstate__(self) -> dict:
        return {'read': self.read, 'kept': self.kept}

    def __setstate__(self, state: dict) -> None:
        RawPatches.__init__(self, **state)


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
    features: Any  # (B, F) float32 of normalised images, without graph
    fit: Any  # takes over what features of a training set say
    expected: Any  # what its part of a state dict has to have in order to be loaded
    adapted: Any  # what it loads of a checkpoint, its own part or all others, and the report of it
    before_start: Any  # reads a file before a new training; gives how images are normalised
    before_training: Any  # is fitted to the training set of a run


def image_reader(model: nn.Module) -> ImageReader | None:
    """What reads images by a network in a model; None if nothing does."""
    return next((part for part in model.modules() if isinstance(part, ImageReader)), None)


@register_notrace_module
class RawPatchEmbed(PatchEmbed):
    """timm's `PatchEmbed` that also hands the raw patches to the layers."""

    raw_patches: RawPatches

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches; (B, channels, height, width) -> (B, L, D), or (B, rows, columns, D)."""
        height, width = x.shape[-2:]
        rows, columns = self.dynamic_feat_size((height, width))
        down = max(rows * self.patch_size[0] - height, 0)
        right = max(columns * self.patch_size[1] - width, 0)
        self.raw_patches.show(F.pad(x, (0, right, 0, down)), (rows, columns))
        return super().forward(x)


class RawPatchBlock(Block):
    """timm's `Block` that checkpoints itself, and keeps the raw patches of its pass for that."""

    raw_patches: RawPatches

    @property
    def grad_checkpointing(self) -> bool:
        """Of all blocks of a model at once."""
        return self.raw_patches.kept

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        self.raw_patches.kept = enable

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `Block`; (B, N, D) -> (B, N, D)."""
        forward = super().forward
        if not self.grad_checkpointing:
            return forward(x, *args, **kwargs)

        def run(x: Tensor, patches: Tensor | None) -> Tensor:
            before, self.raw_patches.value = self.raw_patches.value, patches
            try:
                return forward(x, *args, **kwargs)
            finally:
                if in_recomputation():  # of a part of an earlier pass
                    self.raw_patches.value = before

        return checkpoint(run, x, self.raw_patches.value, use_reentrant=False)


def in_recomputation() -> bool:
    """Whether autograd's backward is running, as when gradient checkpointing repeats a layer."""
    return not torch.compiler.is_compiling() and _backward_pass() != -1


def to_be_repeated() -> bool:
    """Whether this forward pass may be repeated: checkpointing stores nothing in the usual way."""
    # that is costly to prepare for, and most trainings do without
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


# Number of the backward pass that is running; no other has the same, -1 is none.
_backward_pass: Callable[[], int] = torch._C._current_graph_task_id


class RecomputationGuard:
    """Refuses a backward pass that repeats a layer and has a gradient of an outdated pass."""

    _state: object = None
    _repeated_in = _outdated_in = -1

    def state_changed(self) -> None:
        """Know that the layer answers otherwise from now on."""
        # not a number: a compiled step would read it, and be compiled anew after each change
        self._state = object()

    def repeated(self) -> None:
        """Know that the layer is repeated now."""
        self._repeated_in = _backward_pass()
        self._check()

    def watch(self, answer: Any, raw_patches: RawPatches | None) -> None:
        """Remember how things stand in a first pass, for the gradient of its answer."""
        left = answer if isinstance(answer, Tensor) else answer.means
        if left.requires_grad:
            seen = raw_patches if raw_patches is not None and not raw_patches.kept else None
            shown = 0 if seen is None else seen.shown
            left.register_hook(partial(self._arrived, self._state, shown, seen))

    def _arrived(
        self, state: object, shown: int, seen: RawPatches | None, gradient: Tensor
    ) -> None:
        if state is not self._state or (seen is not None and shown != seen.shown):
            self._outdated_in = _backward_pass()
            self._check()

    def _check(self) -> None:
        if self._repeated_in == self._outdated_in:
            raise RuntimeError(
                'gradient checkpointing repeats a MoE layer that would answer otherwise now: call '
                'backward() inside the collect_losses block; for a method that decides by the raw '
                'image use model.set_grad_checkpointing(), which keeps the images of a pass'
            )


def refuse_reentrant(gradient: Tensor) -> None:
    """Hook for an answer that was repeated: use_reentrant=True alone sends gradients through it."""
    raise RuntimeError(
        'gradient checkpointing with use_reentrant=True loses the auxiliary losses of MoE layers: '
        'use use_reentrant=False'
    )
