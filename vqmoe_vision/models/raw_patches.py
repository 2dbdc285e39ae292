"""For methods that decide by the raw image: patches handed to the layers, also under checkpointing.

Legend: B images, L patches, N tokens, D width.
"""

# no `from __future__ import annotations`: TorchScript reads the annotations of methods as types

from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.layers import PatchEmbed, register_notrace_module
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..moe.config import check
from ..moe.host import RawPatches
from ..moe.repeated import in_recomputation
from ..moe.scripting import StaysPython


def hand_over(stem: nn.Module, raw_patches: RawPatches) -> None:
    """Let a stem show images to the layers; what reads them becomes a part of it."""
    stem.raw_patches = raw_patches  # type: ignore[assignment]  # no module
    if isinstance(raw_patches.read, nn.Module):
        stem.reader = raw_patches.read


def raw_patch_parts(raw_patches: RawPatches, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Stem and blocks of a vision transformer whose layers look at raw patches."""
    for name in ('embed_layer', 'block_fn'):
        allowed = 'not set, a method that looks at raw patches brings its own'
        check(name not in kwargs, name, kwargs.get(name), allowed)
    return {
        'embed_layer': partial(RawPatchEmbed, raw_patches=raw_patches),
        'block_fn': partial(RawPatchBlock, raw_patches=raw_patches),
    }


@register_notrace_module
class RawPatchEmbed(StaysPython, PatchEmbed):
    """timm's `PatchEmbed` that also hands the raw patches to the layers."""

    def __init__(self, *, raw_patches: RawPatches, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.raw_patches = raw_patches

    def run(self, x: Tensor) -> Tensor:
        """Embed patches; (B, channels, height, width) -> (B, L, D), or (B, rows, columns, D)."""
        height, width = x.shape[-2:]
        rows, columns = self.dynamic_feat_size((height, width))
        down = max(rows * self.patch_size[0] - height, 0)
        right = max(columns * self.patch_size[1] - width, 0)
        self.raw_patches.show(F.pad(x, (0, right, 0, down)), (rows, columns))
        return PatchEmbed.forward(self, x)


class RawPatchBlock(Block):
    """timm's `Block` that checkpoints itself."""

    # `checkpoint_seq` repeats a block with its input alone, when the layers may look at the patches
    # of another batch: patches travel as an input of their own

    __jit_ignored_attributes__: ClassVar[list[str]] = ['raw_patches']

    def __init__(self, *, raw_patches: RawPatches, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.raw_patches = raw_patches
        self.grad_checkpointing = False

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `Block`; (B, N, D) -> (B, N, D)."""
        # `forward` stays timm's: TorchScript compiles it, and knows no super()
        call = super().__call__
        if not self.grad_checkpointing:
            return call(x, *args, **kwargs)

        def run(x: Tensor, patches: Tensor | None) -> Tensor:
            if in_recomputation():
                with self.raw_patches.restoring(patches):
                    return call(x, *args, **kwargs)
            self.raw_patches.value = patches
            return call(x, *args, **kwargs)

        return checkpoint(run, x, self.raw_patches.value, use_reentrant=False)
