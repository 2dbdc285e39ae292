"""Layers that are repeated in the backward pass, as gradient checkpointing does it.

A repetition does not know which forward pass it repeats: several may have their backward to come. A
gradient does, by the hook that its pass made where an answer left the layer. Either may come first,
but both come in one backward pass.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .joint_losses import Loss

if TYPE_CHECKING:
    from .host import RawPatches

_REENTRANT = (
    'gradient checkpointing with use_reentrant=True loses the auxiliary losses of MoE layers: use '
    'use_reentrant=False'
)
_CHANGED = (
    'gradient checkpointing repeats a MoE layer whose state has already changed: call backward() '
    'inside the collect_losses block'
)
_OTHER_IMAGES = (
    'gradient checkpointing repeats a MoE layer that decides by the raw image, after the model has '
    'looked at other images: use model.set_grad_checkpointing(), which keeps the images of a pass'
)


def in_recomputation() -> bool:
    """Whether autograd's backward is running, as when gradient checkpointing repeats a layer."""
    return not torch.compiler.is_compiling() and _backward_pass() != -1


def to_be_repeated() -> bool:
    """Whether this forward pass may be repeated: checkpointing stores nothing in the usual way."""
    # that is costly to prepare for, and most trainings do without
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _backward_pass() -> int:
    """Number of the backward pass that is running; no other has the same, -1 is none."""
    return torch._C._current_graph_task_id()


class Repetitions:
    """Refuses backward passes that repeat a layer which would not answer as it did."""

    def __init__(self) -> None:
        self.state_changed()
        self._changed = _Meeting(_CHANGED)
        self._other_images = _Meeting(_OTHER_IMAGES)

    def state_changed(self) -> None:
        """Know that the layer answers otherwise from now on."""
        # not a number: a compiled step would read it, and be compiled anew after each change
        self._state = object()

    def begin(self, raw_patches: RawPatches | None) -> None:
        """Know that the layer is repeated now; `raw_patches` if it decides by images."""
        self._changed.repeated()
        if raw_patches is not None and not raw_patches.restored:
            self._other_images.repeated()

    def watch(self, answer: Tensor | Loss, raw_patches: RawPatches | None) -> None:
        """Remember how things stand in a first pass, for the gradient of its answer."""
        left = answer if isinstance(answer, Tensor) else answer.means
        if left.requires_grad:
            shown = 0 if raw_patches is None else raw_patches.shown
            left.register_hook(partial(self._arrived, self._state, shown, raw_patches))

    def _arrived(
        self, state: object, shown: int, raw_patches: RawPatches | None, gradient: Tensor
    ) -> None:
        if state is not self._state:
            self._changed.outdated()
        if raw_patches is not None and shown != raw_patches.shown:
            self._other_images.outdated()


class _Meeting:
    """Refuses a backward pass that repeats a layer, and has a gradient of an outdated pass."""

    def __init__(self, refusal: str) -> None:
        self.refusal = refusal
        self._repeated_in = self._outdated_in = -1

    def repeated(self) -> None:
        self._repeated_in = _backward_pass()
        self._check()

    def outdated(self) -> None:
        self._outdated_in = _backward_pass()
        self._check()

    def _check(self) -> None:
        if self._repeated_in == self._outdated_in:
            raise RuntimeError(self.refusal)


def refuse_reentrant(repeated_answer: Tensor) -> None:
    """Refuse use_reentrant=True, which alone sends gradients through what was repeated."""
    if repeated_answer.requires_grad:
        repeated_answer.register_hook(_raise_reentrant)


def _raise_reentrant(gradient: Tensor) -> None:
    raise RuntimeError(_REENTRANT)
