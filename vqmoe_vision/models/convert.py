"""A model that is already there: a dense one made sparse, or a full one made discrete."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from timm.layers import Mlp, PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..moe import moe_layers as layers_of
from ..moe.config import MoeConfig, check
from ..moe.layer import MoeLayer
from ..moe.methods import METHODS
from ..moe.raw_patches import (
    NETWORK,
    READER,
    Host,
    ImageReader,
    RawPatchBlock,
    RawPatchEmbed,
    RawPatches,
    hand_over,
)
from .compat import StateDict
from .hosts import MOE_HOST
from .moe_vit import (
    MOE_LAYERS,
    MoeEva,
    MoeVisionTransformer,
    SparseModel,
    build_layer,
    check_method,
    host_of,
    moe_options,
    resolve_moe_layers,
    scale_fresh_experts,
)
from .report import Report
from .upcycle import Upcycling, read_upcycling, units_left_out, upcycle

# What a model of timm becomes. A class of its own may compute otherwise and is not converted.
_SPARSE: dict[type[nn.Module], Any] = {
    VisionTransformer: MoeVisionTransformer,
    Eva: MoeEva,
}


def convert_to_moe(
    model: nn.Module,
    method: str,
    *,
    moe_layers: str | Sequence[int] = MOE_LAYERS,
    upcycling: Upcycling | dict[str, Any] | None = None,
    **options: Any,
) -> Report:
    """Make a dense vision transformer a sparse one in place, with experts made of its MLPs.

    Convert before an optimizer takes the parameters. Experts are frozen where the parameters that
    they are made of were; routers and codebooks are new, and train.

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
    copied, lost = _put_layers(model, method, moe_layers, options, how, made_of_mlps=True)
    assert isinstance(model, SparseModel)
    model.weights_report = _report(model, copied, lost)
    _record(model, {'method': method, 'moe_layers': moe_layers, **options})
    return model.weights_report


def put_fresh_layers(
    model: nn.Module,
    method: str,
    moe_layers: str | Sequence[int] = MOE_LAYERS,
    upcycling: Upcycling | dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """As `convert_to_moe`, but experts are drawn as routers are: for weights that come later."""
    how = read_upcycling(upcycling)
    _put_layers(model, method, moe_layers, options, how, made_of_mlps=False)
    scale_fresh_experts(model)


def _put_layers(
    model: nn.Module,
    method: str,
    moe_layers: str | Sequence[int],
    options: dict[str, Any],
    how: Upcycling,
    made_of_mlps: bool,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Changes the model; returns which tensors were made of which of its MLPs, and losses."""
    config = _checked_config(model, method, options)
    dense: Any = model
    blocks = dense.blocks
    host = _host(dense, method, config)
    of_model: dict[str, Any] = {
        'weight_init': getattr(dense, 'weight_init_mode', ''),  # an Eva has no such option
        'patch_drop_rate': getattr(dense.patch_drop, 'prob', 0.0),
    }
    built: dict[int, MoeLayer] = {}
    copied: dict[str, str] = {}
    lost: dict[str, None] = {}
    for i in resolve_moe_layers(moe_layers, len(blocks)):
        name = f'blocks.{i}.mlp'
        built[i] = _layer_like(blocks[i], name, method, config, host, of_model)
        if made_of_mlps:
            made = _take_over(built[i], blocks[i].mlp, how, name)
            lost |= dict.fromkeys(units_left_out(blocks[i].mlp.state_dict(), built[i].experts))
            copied |= {f'{name}.experts.{key}': f'{name}.{key}' for key in made}
    reader = host.raw_patches.read
    if isinstance(reader, ImageReader):
        copied |= {f'{READER}{NETWORK}{key}': key for key in reader.network.state_dict()}
    # nothing is refused from here on
    for i, layer in built.items():
        blocks[i].mlp = layer
    if reader is not None:
        _show_patches(dense, host.raw_patches)
    given = model.__dict__.pop('_model_args', {})  # a property of the class to be would hide it
    model.__class__ = _SPARSE[type(model)]
    assert isinstance(model, SparseModel)
    model.describe(method, config, how)
    model._model_args = given
    return copied, tuple(lost)


def _host(dense: Any, method: str, config: MoeConfig) -> Host:
    proj = dense.patch_embed.proj
    allowed = 'a convolution; the stems of ViTamin and MobileCLIP end without one'
    check(isinstance(proj, nn.Conv2d), 'patch_embed.proj', type(proj).__name__, allowed)
    if METHODS[method].read_patches is not None:
        _check_patches(dense, method)
    factory = {'device': proj.weight.device, 'dtype': proj.weight.dtype}
    # what the model was becomes what reads its images
    reader = METHODS[method].reader(config, lambda: copy.deepcopy(dense), **factory)
    return host_of(dense, RawPatches(reader))


def _checked_config(model: nn.Module, method: str, options: dict[str, Any]) -> MoeConfig:
    kind = type(model)
    check_method(method)
    allowed = f"timm's {' or '.join(plain.__name__ for plain in _SPARSE)}, dense and not wrapped"
    check(kind in _SPARSE, 'model', kind.__name__, allowed)
    known = moe_options(method)
    for name in options:
        if name not in known:
            raise TypeError(f'{name!r} is no option of {method}: {", ".join(sorted(known))}')
    return METHODS[method].config.from_options(**options)


def _layer_like(
    block: nn.Module,
    name: str,
    method: str,
    config: MoeConfig,
    host: Host,
    of_model: dict[str, Any],
) -> MoeLayer:
    mlp = _plain_mlp(block, name)
    weight = mlp.fc1.weight
    layer = build_layer(
        method,
        config,
        host,
        mlp.fc1.in_features,
        mlp.fc1.out_features / mlp.fc1.in_features,
        act_layer=lambda: copy.deepcopy(mlp.act),
        bias=mlp.fc1.bias is not None,
        drop=_rate(mlp.drop1),
        **of_model,
        device=weight.device,
        dtype=weight.dtype,
    )
    return layer.train(mlp.training)


def _plain_mlp(block: nn.Module, name: str) -> Any:
    """The MLP of a block, of which experts can be made; any other is refused."""
    mlp: Any = getattr(block, 'mlp', None)
    allowed = 'a block with one MLP apart from its attention, in whose place experts stand'
    check(mlp is not None, name.removesuffix('.mlp'), type(block).__name__, allowed)
    kind = type(mlp).__name__
    other = '; gated MLPs (SwiGLU) have another' if 'GLU' in kind.upper() else ''
    check(type(mlp) is Mlp, name, kind, f"timm's Mlp, whose layout experts have{other}")
    plain = isinstance(mlp.norm, nn.Identity)
    check(plain, name, kind, 'one without a norm between its layers')
    for part, linear in (('fc1', mlp.fc1), ('fc2', mlp.fc2)):
        allowed = "torch's Linear itself, a class of its own may compute otherwise"
        check(type(linear) is nn.Linear, f'{name}.{part}', type(linear).__name__, allowed)
    hooked = any(hooks for part in mlp.modules() for hooks in _hooks_of(part))
    check(not hooked, f'{name} hooks', 'set', 'none: experts would not call them, remove them')
    for part in ('drop1', 'drop2'):
        dropped = type(getattr(mlp, part))
        allowed = 'Dropout or Identity, experts have nothing else there'
        check(dropped in (nn.Dropout, nn.Identity), f'{name}.{part}', dropped.__name__, allowed)
    pairs = {
        'bias': (mlp.fc1.bias is not None, mlp.fc2.bias is not None),
        'drop': (_rate(mlp.drop1), _rate(mlp.drop2)),
    }
    for what, (first, second) in pairs.items():
        check(first == second, f'{name} {what}', (first, second), 'the same in both layers')
    return mlp


def _rate(drop: nn.Module) -> float:
    """Of a layer that drops, or of what stands in its place and drops nothing."""
    return float(getattr(drop, 'p', 0.0))


def _hooks_of(module: Any) -> list[Any]:
    return [
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ]


def _take_over(layer: MoeLayer, mlp: nn.Module, how: Upcycling, name: str) -> StateDict:
    """Makes the experts of an MLP, frozen where it is; returns their state."""
    made = upcycle(mlp.state_dict(), layer.experts, how, name)
    layer.experts.load_state_dict(made)
    for key in made:
        trains = mlp.get_parameter(key).requires_grad
        layer.experts.get_parameter(key).requires_grad_(trains)
    return made


def _check_patches(model: Any, method: str) -> None:
    """Refuses what `raw_patch_parts` would have refused, or built otherwise."""
    stem = type(model.patch_embed)
    check(stem is PatchEmbed, 'patch_embed', stem.__name__, f'PatchEmbed, which {method} reads')
    for block in model.blocks:
        kind = type(block)
        check(
            kind is Block,
            'block',
            kind.__name__,
            f'Block of a VisionTransformer, for {method} looks at raw patches',
        )


def _show_patches(model: Any, raw_patches: RawPatches) -> None:
    """Stem and blocks of the same weights that also hand over raw patches."""
    blocks = model.blocks
    model.patch_embed.__class__ = RawPatchEmbed
    hand_over(model.patch_embed, raw_patches)
    if isinstance(raw_patches.read, nn.Module):
        raw_patches.read.train(model.training)
    for block in blocks:
        block.raw_patches = raw_patches
        block.__class__ = RawPatchBlock
        block.grad_checkpointing = model.grad_checkpointing
    model.grad_checkpointing = False


def _report(model: nn.Module, copied: dict[str, str], lost: tuple[str, ...]) -> Report:
    """Of what was there before: all but what the new layers and a reader of images have."""
    new = (READER, *(f'{name}.' for name in layers_of(model)))
    names = list(model.state_dict())
    return Report(
        loaded=tuple(name for name in names if not name.startswith(new)),
        copied=copied,
        initialised=tuple(k for k in names if k.startswith(new) and k not in copied),
        remarks=lost,
        warnings=lost,
    )


def _record(model: Any, sparse: dict[str, Any]) -> None:
    """What builds the model again, if timm has built it by name."""
    config = getattr(model, 'pretrained_cfg', None) or {}
    if config.get('architecture'):
        model._model_args = {**model._model_args, 'host': config['architecture'], **sparse}
        model.pretrained_cfg = model.default_cfg = {**config, 'architecture': MOE_HOST}


def changeable_layers(model: nn.Module) -> list[MoeLayer]:
    """The MoE layers of a model whose parameters are about to change, or go."""
    is_model = isinstance(model, nn.Module)
    check(is_model, 'model', type(model).__name__, 'a model with MoE layers and its weights')
    layers = list(layers_of(model).values())
    check(len(layers) > 0, 'model', type(model).__name__, 'a model with MoE layers')
    for module in model.modules():
        wrapped = isinstance(module, DistributedDataParallel)
        check(not wrapped, 'model', type(module).__name__, 'one that is not wrapped yet')
    return layers


def to_discrete(model: nn.Module) -> nn.Module:
    """Keep the discrete branch of every MoE layer alone: for fine-tuning and serving.

    The answers are those of the full model whose gates give the discrete branch all the weight.
    Call it before an optimizer takes the parameters.

    Args:
        model: Any model whose MoE layers have both branches, before it is distributed. It is
            changed in place and returned, or left as it is if a layer refuses.

    Raises:
        ValueError: A layer has no discrete branch, or as `changeable_layers`.
    """
    layers = changeable_layers(model)
    for layer in layers:
        layer.check_discrete()
    # nothing is refused from here on
    changed: dict[str, Any] = {}
    for layer in layers:
        changed |= layer.to_discrete()
    for module in model.modules():
        if isinstance(module, SparseModel):
            module.moe_config = replace(module.moe_config, **changed)
            module._model_args = {**module._model_args, **changed}
    return model
