"""A model that is already there, changed in place: dense to sparse, and full to discrete."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from timm.layers import Mlp, PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from ..moe import moe_layers as layers_of
from ..moe.config import MoeConfig, check
from ..moe.host import Host, RawPatches
from ..moe.image_reader import ImageReader
from ..moe.layer import MoeLayer
from ..moe.methods import METHODS
from .arguments import moe_options, resolve_moe_layers
from .feature_network import NETWORK, READER, features_of
from .raw_patches import RawPatchBlock, RawPatchEmbed, hand_over
from .sparse_model import MoeEva, MoeVisionTransformer, SparseModel, build_layer
from .state_dicts import Report, StateDict
from .upcycle import Upcycling, read_upcycling, upcycle

# What a model of timm becomes. A class of its own may compute otherwise and is not converted.
_SPARSE: dict[type[nn.Module], Any] = {
    VisionTransformer: MoeVisionTransformer,
    Eva: MoeEva,
}


def convert_to_moe(
    model: nn.Module,
    method: str,
    *,
    moe_layers: str | Sequence[int] = 'every2',
    upcycling: Upcycling | dict[str, Any] | None = None,
    **options: Any,
) -> Report:
    """Make a dense vision transformer a sparse one in place, with experts made of its MLPs.

    Afterwards a `VisionTransformer` is a `MoeVisionTransformer`, and its state dict is that of an
    entry point with the same sizes and options; an `Eva` is a `MoeEva`. Convert before an optimizer
    takes the parameters.

    Args:
        model: timm's `VisionTransformer` or `Eva` (DINOv3) whose blocks have plain MLPs. It is
            changed, or left as it is if anything is refused.
        method: Key of `METHODS`.
        moe_layers: Which blocks become MoE, see `resolve_moe_layers`.
        upcycling: How experts are made, see `Upcycling`; None for equal copies.
        **options: Of the method.

    Returns:
        What became of each tensor.

    Raises:
        ValueError: A value is impossible, or the model or a block is of another kind.
        TypeError: The method has no such option.
    """
    how = read_upcycling(upcycling)
    config = _checked_config(model, method, options)
    dense: Any = model
    blocks, stem = dense.blocks, dense.patch_embed
    if METHODS[method].read_patches is not None:
        _check_patches(dense)
    weight = stem.proj.weight
    factory = {'device': weight.device, 'dtype': weight.dtype}
    # what the model was becomes what reads its images
    raw_patches = RawPatches(METHODS[method].reader(config, lambda: features_of(dense), **factory))
    prefix_tokens = dense.num_prefix_tokens
    num_tokens = stem.num_patches + prefix_tokens
    host = Host(num_tokens, prefix_tokens, stem.proj.in_channels, raw_patches)
    built: dict[int, MoeLayer] = {}
    copied: dict[str, str] = {}
    for i in resolve_moe_layers(moe_layers, len(blocks)):
        built[i], made = _layer_like(blocks[i], f'blocks.{i}.mlp', method, config, host, how)
        prefix = f'blocks.{i}.mlp'
        copied |= {f'{prefix}.experts.{key}': f'{prefix}.{key}' for key in made}
    if isinstance(raw_patches.read, ImageReader):
        copied |= {f'{READER}{NETWORK}{key}': key for key in raw_patches.read.network.state_dict()}
    # nothing is refused from here on
    names = set(model.state_dict())
    for i, layer in built.items():
        blocks[i].mlp = layer
    if raw_patches.read is not None:
        _show_patches(dense, raw_patches)
    report = _report(model, names, copied)
    model.__class__ = _SPARSE[type(model)]
    assert isinstance(model, SparseModel)
    model.describe(method, config, how, report)
    return report


def _checked_config(model: nn.Module, method: str, options: dict[str, Any]) -> MoeConfig:
    kind = type(model)
    check(method in METHODS, 'method', method, f'one of {", ".join(METHODS)}')
    allowed = f"timm's {' or '.join(plain.__name__ for plain in _SPARSE)}, dense and not wrapped"
    check(kind in _SPARSE, 'model', kind.__name__, allowed)
    known = moe_options(method)
    for name in options:
        if name not in known:
            raise TypeError(f'{name!r} is no option of {method}: {", ".join(sorted(known))}')
    return METHODS[method].config.from_options(**options)


def _layer_like(
    block: nn.Module, name: str, method: str, config: MoeConfig, host: Host, how: Upcycling
) -> tuple[MoeLayer, StateDict]:
    """The layer in the place of a block's MLP, its experts made of it, and their state."""
    mlp: Any = getattr(block, 'mlp', None)
    kind = type(block if mlp is None else mlp).__name__
    allowed = "timm's Mlp, whose layout experts have; gated MLPs (SwiGLU) have another"
    check(type(mlp) is Mlp, name, kind, allowed)
    plain = isinstance(mlp.norm, nn.Identity) and isinstance(mlp.fc1, nn.Linear)
    check(plain, name, kind, 'one of linear layers, without a norm between them')
    pairs = {
        'bias': (mlp.fc1.bias is not None, mlp.fc2.bias is not None),
        'drop': (mlp.drop1.p, mlp.drop2.p),
    }
    for what, (first, second) in pairs.items():
        check(first == second, f'{name} {what}', (first, second), 'the same in both layers')
    weight = mlp.fc1.weight
    layer = build_layer(
        method,
        config,
        host,
        mlp.fc1.in_features,
        mlp.fc1.out_features / mlp.fc1.in_features,
        act_layer=lambda: copy.deepcopy(mlp.act),
        bias=mlp.fc1.bias is not None,
        drop=mlp.drop1.p,
        device=weight.device,
        dtype=weight.dtype,
    )
    made = upcycle(mlp.state_dict(), layer.experts, how, name)
    layer.experts.load_state_dict(made)
    return layer.train(mlp.training), made


def _check_patches(model: Any) -> None:
    """Refuses what `raw_patch_parts` would have refused, or built otherwise."""
    stem = type(model.patch_embed)
    check(
        stem is PatchEmbed, 'patch_embed', stem.__name__, 'PatchEmbed, for a method that reads it'
    )
    for block in model.blocks:
        kind = type(block)
        check(
            kind is Block, 'block', kind.__name__, 'Block, for a method that looks at raw patches'
        )
    dropping = not isinstance(model.patch_drop, nn.Identity)
    check(not dropping, 'patch_drop_rate', model.patch_drop, '0, the method routes every raw patch')


def _show_patches(model: Any, raw_patches: RawPatches) -> None:
    """Stem and blocks of the same weights that also hand over raw patches."""
    blocks = model.blocks
    model.patch_embed.__class__ = RawPatchEmbed
    hand_over(model.patch_embed, raw_patches)
    for block in blocks:
        block.raw_patches = raw_patches
        block.__class__ = RawPatchBlock
        block.grad_checkpointing = model.grad_checkpointing
    model.grad_checkpointing = False


def _report(model: nn.Module, dense: set[str], copied: dict[str, str]) -> Report:
    names = list(model.state_dict())
    return Report(
        loaded=tuple(name for name in names if name in dense),
        copied=copied,
        initialised=tuple(name for name in names if name not in dense and name not in copied),
    )


def to_discrete(model: nn.Module) -> nn.Module:
    """Keep the discrete branch of every MoE layer alone: for fine-tuning and serving.

    What the other branch had is removed from the model, in place. The answers are those of the full
    model whose gates give the discrete branch all the weight. Call it before an optimizer takes the
    parameters.

    Args:
        model: Any model whose MoE layers have both branches, such as a classifier, a segmentor or a
            timm model. It is changed, or left as it is if a layer refuses.

    Returns:
        The model.

    Raises:
        ValueError: A layer has no discrete branch, or there is no MoE layer.
    """
    layers = layers_of(model).values()
    check(len(layers) > 0, 'model', type(model).__name__, 'a model with MoE layers')
    changed: dict[str, Any] = {}
    for layer in layers:
        changed |= layer.to_discrete()
    for module in model.modules():
        if isinstance(module, SparseModel):
            module.moe_config = replace(module.moe_config, **changed)
            unused = module.moe_config.unused()
            args = {k: v for k, v in module._model_args.items() if k not in unused}
            module._model_args = {**args, **changed}
    return model
