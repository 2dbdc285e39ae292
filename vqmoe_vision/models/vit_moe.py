"""Vision transformers whose blocks hold mixture-of-experts layers, registered with timm.

`timm.create_model('vit_small_vqmoe', num_experts=16, moe_layers='last2')`: every argument of
timm's `VisionTransformer` and every option of the method's configuration dataclass is a keyword.

Only `blocks[i].mlp` differs from timm's ViT of the same size; the blocks, the stem, the head and
their names are timm's, so weights of dense models fit everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from timm.layers import get_act_layer, register_notrace_module
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..moe.config import MoeConfig, check
from ..moe.experts import Experts
from ..moe.host import Host, RawPatches
from ..moe.layer import MoeLayer
from ..moe.methods import METHODS
from .arguments import (
    check_experts,
    check_names,
    check_patches,
    check_vit_arguments,
    named_failures,
    resolve_moe_layers,
)
from .raw_patches import RawPatchBlock, raw_patch_parts
from .sources import fit_pretrained, named_source, source_of, upcycle_overlay
from .sparse_model import SparseModel
from .upcycle import Upcycling, read_upcycling

__all__ = ['MoeVisionTransformer']  # register_model adds each entry point


class MoeVisionTransformer(SparseModel, VisionTransformer):
    """timm's `VisionTransformer` with MoE layers in the place of some MLPs.

    Args:
        method: Key of `METHODS`.
        moe_layers: Which blocks are MoE, see `resolve_moe_layers`.
        fix_init: Rescale output layers by depth after they are initialised, as timm's option.
        upcycling: How experts are made of the MLPs of a dense model whose weights are loaded: an
            `Upcycling`, a dictionary of its options, or None for equal copies.
        **kwargs: Arguments of `VisionTransformer`, and options of the method.

    Raises:
        ValueError: If a value is impossible; names the field, the value and what is allowed.
        TypeError: If an argument is unknown.
    """

    def __init__(
        self,
        *,
        method: str,
        moe_layers: str | Sequence[int] = 'every2',
        fix_init: bool = False,
        upcycling: Upcycling | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        how = read_upcycling(upcycling)
        names = METHODS[method].config.option_names()
        options = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        check_names(kwargs, method)
        check_vit_arguments({**kwargs, 'fix_init': fix_init})
        check_experts(kwargs)
        raw_patches = RawPatches(METHODS[method].read_patches)
        if raw_patches.read is not None:
            kwargs.update(raw_patch_parts(raw_patches, kwargs))
        with named_failures(VisionTransformer, kwargs):
            super().__init__(**kwargs)
        check_patches(self, kwargs)
        self.describe(method, METHODS[method].config.from_options(**options), how)
        num_tokens = self.patch_embed.num_patches + self.num_prefix_tokens
        host = Host(num_tokens, self.num_prefix_tokens, self.in_chans, raw_patches)
        for i in resolve_moe_layers(moe_layers, len(self.blocks)):
            has_mlp = hasattr(self.blocks[i], 'mlp')
            check(has_mlp, 'block_fn', kwargs.get('block_fn'), 'a block with an `mlp` to replace')
            self.blocks[i].mlp = build_layer(
                method,
                self.moe_config,
                host,
                self.embed_dim,
                kwargs.get('mlp_ratio', 4.0),
                act_layer=get_act_layer(kwargs.get('act_layer')) or nn.GELU,
                bias=kwargs.get('proj_bias', True),
                drop=kwargs.get('proj_drop_rate', 0.0),
                **{name: kwargs.get(name) for name in ('device', 'dtype')},
            )
        self.fix_init = fix_init
        if fix_init:
            self.fix_init_weight()

    def fix_init_weight(self) -> None:
        """Rescale output layers by depth as timm does, those of experts too."""
        blocks: Any = self.blocks
        with torch.no_grad():
            for i, block in enumerate(blocks):
                scale = (2.0 * (i + 1)) ** 0.5
                block.attn.proj.weight.div_(scale)
                mlp = getattr(block.mlp, 'experts', block.mlp)
                mlp.fc2.weight.div_(scale)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing."""
        if isinstance(self.blocks[0], RawPatchBlock):
            blocks: Any = self.blocks
            for block in blocks:
                block.grad_checkpointing = enable
        else:
            super().set_grad_checkpointing(enable)


def build_layer(
    method: str,
    config: MoeConfig,
    host: Host,
    width: int,
    mlp_ratio: float,
    act_layer: Callable[[], nn.Module] = nn.GELU,
    bias: bool = True,
    drop: float = 0.0,
    **factory: Any,
) -> MoeLayer:
    """MoE layer of a method with experts that are like the MLPs of its model.

    Args:
        method: Key of `METHODS`.
        config: Its options.
        host: The model.
        width: D, of its tokens.
        mlp_ratio: Hidden width of its MLPs over D, which experts take unless the options say.
        act_layer: As those of the MLPs.
        bias: As those of the MLPs.
        drop: As those of the MLPs.
        **factory: `device` and `dtype`.

    Raises:
        ValueError: An expert would have no hidden feature.
    """
    ratio = config.expert_mlp_ratio or mlp_ratio
    hidden = int(width * ratio)
    check(hidden >= 1, 'expert_mlp_ratio', ratio, 'wide enough for one hidden feature')
    experts = Experts(config.num_experts, width, hidden, act_layer, bias, drop, **factory)
    layer = METHODS[method].build(width, config, experts, host, **factory)
    # torch.fx, which timm's feature extraction uses, takes it as one operation
    register_notrace_module(type(layer))
    return layer


def _cfg() -> dict[str, Any]:
    return {
        'url': '',
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': None,
        'crop_pct': 0.9,
        'interpolation': 'bicubic',
        'fixed_input_size': True,
        'mean': (0.5, 0.5, 0.5),
        'std': (0.5, 0.5, 0.5),
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
    }


SIZES: dict[str, dict[str, int]] = {
    'tiny': {'patch_size': 16, 'embed_dim': 192, 'depth': 12, 'num_heads': 3},
    'small': {'patch_size': 16, 'embed_dim': 384, 'depth': 12, 'num_heads': 6},
    'base': {'patch_size': 16, 'embed_dim': 768, 'depth': 12, 'num_heads': 12},
    'large': {'patch_size': 16, 'embed_dim': 1024, 'depth': 24, 'num_heads': 16},
}

default_cfgs = generate_default_cfgs(
    {f'vit_{size}_{method}.untrained': _cfg() for size in SIZES for method in METHODS}
)


def _create(
    size: str, method: str, pretrained: bool, upcycle: str | None = None, **kwargs: Any
) -> MoeVisionTransformer:
    """A model as timm builds it.

    Args:
        size: Key of `SIZES`.
        method: Key of `METHODS`.
        pretrained: Whether to load weights, which `pretrained_cfg_overlay` has to name.
        upcycle: What to start from instead, see `upcycle_overlay`.
        **kwargs: Of `MoeVisionTransformer` and of `build_model_with_cfg`.

    Raises:
        ValueError: An argument is impossible, or the weights cannot be read or do not fit.
    """
    out_indices = kwargs.pop('out_indices', 3)
    overlay = kwargs.pop('pretrained_cfg_overlay', None) or {}
    if upcycle is not None:
        check(not pretrained, 'pretrained', True, f'False with upcycle={upcycle!r}')
        pretrained, overlay = True, {**upcycle_overlay(upcycle, kwargs.get('cache_dir')), **overlay}
    config = kwargs.get('pretrained_cfg')
    source = source_of({**(config if isinstance(config, dict) else {}), **overlay})
    with named_source(source) if pretrained and source else nullcontext():
        return build_model_with_cfg(
            MoeVisionTransformer,
            f'vit_{size}_{method}',
            pretrained,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=fit_pretrained,
            feature_cfg={'out_indices': out_indices, 'feature_cls': 'getter'},
            method=method,
            **{**SIZES[size], **kwargs},
        )


@register_model
def vit_tiny_vqmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-Ti/16 with VQMoE layers."""
    return _create('tiny', 'vqmoe', pretrained, **kwargs)


@register_model
def vit_small_vqmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-S/16 with VQMoE layers."""
    return _create('small', 'vqmoe', pretrained, **kwargs)


@register_model
def vit_base_vqmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-B/16 with VQMoE layers."""
    return _create('base', 'vqmoe', pretrained, **kwargs)


@register_model
def vit_large_vqmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-L/16 with VQMoE layers."""
    return _create('large', 'vqmoe', pretrained, **kwargs)


@register_model
def vit_tiny_softmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-Ti/16 with SoftMoE layers."""
    return _create('tiny', 'softmoe', pretrained, **kwargs)


@register_model
def vit_small_softmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-S/16 with SoftMoE layers."""
    return _create('small', 'softmoe', pretrained, **kwargs)


@register_model
def vit_base_softmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-B/16 with SoftMoE layers."""
    return _create('base', 'softmoe', pretrained, **kwargs)


@register_model
def vit_large_softmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-L/16 with SoftMoE layers."""
    return _create('large', 'softmoe', pretrained, **kwargs)


@register_model
def vit_tiny_smoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-Ti/16 with SMoE layers."""
    return _create('tiny', 'smoe', pretrained, **kwargs)


@register_model
def vit_small_smoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-S/16 with SMoE layers."""
    return _create('small', 'smoe', pretrained, **kwargs)


@register_model
def vit_base_smoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-B/16 with SMoE layers."""
    return _create('base', 'smoe', pretrained, **kwargs)


@register_model
def vit_large_smoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-L/16 with SMoE layers."""
    return _create('large', 'smoe', pretrained, **kwargs)


@register_model
def vit_tiny_stablemoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-Ti/16 with StableMoE layers."""
    return _create('tiny', 'stablemoe', pretrained, **kwargs)


@register_model
def vit_small_stablemoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-S/16 with StableMoE layers."""
    return _create('small', 'stablemoe', pretrained, **kwargs)


@register_model
def vit_base_stablemoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-B/16 with StableMoE layers."""
    return _create('base', 'stablemoe', pretrained, **kwargs)


@register_model
def vit_large_stablemoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-L/16 with StableMoE layers."""
    return _create('large', 'stablemoe', pretrained, **kwargs)


@register_model
def vit_tiny_xmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-Ti/16 with XMoE layers."""
    return _create('tiny', 'xmoe', pretrained, **kwargs)


@register_model
def vit_small_xmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-S/16 with XMoE layers."""
    return _create('small', 'xmoe', pretrained, **kwargs)


@register_model
def vit_base_xmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-B/16 with XMoE layers."""
    return _create('base', 'xmoe', pretrained, **kwargs)


@register_model
def vit_large_xmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-L/16 with XMoE layers."""
    return _create('large', 'xmoe', pretrained, **kwargs)


@register_model
def vit_tiny_ecmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-Ti/16 with expert choice layers."""
    return _create('tiny', 'ecmoe', pretrained, **kwargs)


@register_model
def vit_small_ecmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-S/16 with expert choice layers."""
    return _create('small', 'ecmoe', pretrained, **kwargs)


@register_model
def vit_base_ecmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-B/16 with expert choice layers."""
    return _create('base', 'ecmoe', pretrained, **kwargs)


@register_model
def vit_large_ecmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-L/16 with expert choice layers."""
    return _create('large', 'ecmoe', pretrained, **kwargs)


@register_model
def vit_tiny_hashmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-Ti/16 with hash layers."""
    return _create('tiny', 'hashmoe', pretrained, **kwargs)


@register_model
def vit_small_hashmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-S/16 with hash layers."""
    return _create('small', 'hashmoe', pretrained, **kwargs)


@register_model
def vit_base_hashmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-B/16 with hash layers."""
    return _create('base', 'hashmoe', pretrained, **kwargs)


@register_model
def vit_large_hashmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-L/16 with hash layers."""
    return _create('large', 'hashmoe', pretrained, **kwargs)
