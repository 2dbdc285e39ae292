"""The vision transformers of timm that take experts, each with what it becomes.

Legend: B images, N tokens per image with prefix tokens and padding, D width.
"""

from typing import Any

import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaBlock
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from ..moe.config import check
from ..moe.layer import MoeLayer
from ..moe.valid import ValidTokens
from .moe_vit import MoeVisionTransformer, SizedModel, SparseModel


class MoeVisionTransformerDistilled(MoeVisionTransformer, VisionTransformerDistilled):
    """timm's distilled DeiT with MoE layers."""


class MoeEva(SizedModel, Eva):
    """timm's `Eva`, of which DINOv3's models are, with MoE layers."""


class MoeBeit(SizedModel, Beit):
    """timm's `Beit` with MoE layers."""


class MoeVisionTransformerRelPos(SizedModel, VisionTransformerRelPos):
    """timm's vision transformer of relative positions with MoE layers."""


class MoeVisionTransformerSAM(SparseModel, VisionTransformerSAM):
    """timm's image encoder of Segment Anything with MoE layers, which see windows no more."""


class _PaddedBlock:
    """Mixin before a block of timm's, whose MoE layer is told which tokens are there."""

    mlp: Any

    def forward(self, x: Tensor, *args: Any, attn_mask: Any = None, **kwargs: Any) -> Tensor:
        """As timm's, with what `MoeNaFlexVit` hands over for `attn_mask`; (B, N, D)."""
        # an argument, which gradient checkpointing has again when it repeats the block
        mask, valid = attn_mask if isinstance(attn_mask, tuple) else (attn_mask, None)
        if isinstance(self.mlp, MoeLayer):
            self.mlp.valid = valid
        try:
            return super().forward(x, *args, attn_mask=mask, **kwargs)  # type: ignore[misc]
        finally:
            if isinstance(self.mlp, MoeLayer):
                self.mlp.valid = None


class PaddedBlock(_PaddedBlock, Block):
    """`_PaddedBlock` of timm's `Block`."""


class PaddedEvaBlock(_PaddedBlock, EvaBlock):
    """`_PaddedBlock` of timm's `EvaBlock`."""


_PADDED: dict[type[nn.Module], Any] = {Block: PaddedBlock, EvaBlock: PaddedEvaBlock}


class MoeNaFlexVit(SparseModel, NaFlexVit):
    """timm's `NaFlexVit` with MoE layers.

    Of a batch that is padded to one length, `patch_valid` says which patches are there. Experts,
    routers, losses, loads and codebooks see those and the prefix tokens alone; expert choice and
    SoftMoE take each image as if it came without padding. An MoE layer answers zero for the rest.
    The host waits for the device once a pass, where the tokens are counted.
    """

    def describe(self, *args: Any) -> None:
        """As `SparseModel`; all blocks take the mask of tokens."""
        super().describe(*args)
        for block in self.blocks:
            block.__class__ = _PADDED[type(block)]

    def _forward_embeds(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found: dict = super()._forward_embeds(*args, **kwargs)
        if (patches := found['patch_valid']) is not None:  # after some were dropped
            tokens = F.pad(patches.bool(), (self.num_prefix_tokens, 0), value=True)
            # the one thing that timm hands to each block and its checkpoint as it is
            found['attn_mask'] = found['attn_mask'], ValidTokens.of(tokens)
        return found


# What a model of timm becomes. A class of its own may compute otherwise and is not converted.
HOSTS: dict[type[nn.Module], Any] = {
    VisionTransformer: MoeVisionTransformer,
    VisionTransformerDistilled: MoeVisionTransformerDistilled,
    Eva: MoeEva,
    Beit: MoeBeit,
    VisionTransformerRelPos: MoeVisionTransformerRelPos,
    VisionTransformerSAM: MoeVisionTransformerSAM,
    NaFlexVit: MoeNaFlexVit,
}


def check_host(model: nn.Module) -> Any:
    """What a dense model becomes; another one is refused."""
    kind = type(model)
    allowed = f"timm's {', '.join(host.__name__ for host in HOSTS)}, dense and not wrapped"
    check(kind in HOSTS, 'model', kind.__name__, allowed)
    if isinstance(model, NaFlexVit):
        others = [type(block).__name__ for block in model.blocks if type(block) not in _PADDED]
        check(not others, 'block_fn', others, "timm's Block or EvaBlock")
    return HOSTS[kind]
