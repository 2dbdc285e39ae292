"""What StableMoE needs from a timm ViT: raw patches for its routers, also under checkpointing.

Legend: B images, L patches, N tokens, D width.
"""

# no `from __future__ import annotations`: TorchScript reads the annotations of methods as types

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..moe.methods.stablemoe import RawPatches, StableMoEMlp
from ..moe.scripting import StaysPython


class RawPatchEmbed(StaysPython, PatchEmbed):
    """timm's `PatchEmbed` that also hands the raw patches to the routers.

    Args:
        source: Where the routers look for them.
        **kwargs: As `PatchEmbed`.
    """

    def __init__(self, *, source: RawPatches, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.source = source

    def run(self, x: Tensor) -> Tensor:
        """Embed patches; (B, channels, height, width) -> (B, L, D), or (B, rows, columns, D)."""
        height, width = x.shape[-2:]
        rows, columns = self.dynamic_feat_size((height, width))
        down = max(rows * self.patch_size[0] - height, 0)
        right = max(columns * self.patch_size[1] - width, 0)
        self.source.read(F.pad(x, (0, right, 0, down)), (rows, columns))
        return PatchEmbed.forward(self, x)


class StableBlock(Block):
    """timm's `Block` that checkpoints itself.

    `checkpoint_seq` repeats a block with nothing but its input. By then the routers may look at the
    patches of another batch, so the patches have to travel as an input of their own.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.grad_checkpointing = False

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As `Block.forward`; (B, N, D) -> (B, N, D)."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self._checkpointed(x, attn_mask, is_causal)
        attention = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(attention))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    @torch.jit.ignore
    def _checkpointed(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        mlp: Any = self.mlp
        routed = isinstance(mlp, StableMoEMlp)
        cells = mlp.router.source.cells if routed else None

        def run(x: Tensor, cells: Tensor | None) -> Tensor:
            if routed:
                mlp.router.source.cells = cells
            return Block.forward(self, x, attn_mask, is_causal)

        return checkpoint(run, x, cells, use_reentrant=False)
