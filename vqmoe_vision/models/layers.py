"""MoE layers in the place of a model's MLPs, with experts like them."""

import copy
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeAlias

import timm
import torch
from timm.layers import GluMlp, LayerNorm, Mlp, PatchEmbed, SwiGLU, register_notrace_module
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block, VisionTransformer, get_init_weights_vit
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from ..moe.config import MoeConfig, check
from ..moe.experts import Experts
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
)
from .upcycle import Upcycling, upcycle

# What is analysed too: it has patches in order behind prefix tokens. And what else takes experts.
Transformer: TypeAlias = VisionTransformer | Eva | Beit
Convertible: TypeAlias = Transformer | VisionTransformerRelPos | VisionTransformerSAM | NaFlexVit
# Modules of timm, and ours, whose models are `VisionTransformer`s, and those with `Eva`s.
OWN_MODULES = ('vit_moe',)
VIT_MODULES = ('vision_transformer', 'deit', *OWN_MODULES)
MODULES = (*VIT_MODULES, 'eva')
# Entry point that builds one of timm's and puts experts into it.
MOE_HOST = 'moe_host'
# Which blocks hold an MoE layer unless a model is told otherwise.
MOE_LAYERS = 'every2'
# What experts can be made of, by what a config calls it.
MLPS: dict[str, Any] = {kind.__name__: kind for kind in (Mlp, GluMlp, SwiGLU)}
# Parts of an MLP that experts have, and what each may be: a class of its own may compute otherwise.
_PARTS = {
    'fc1': (nn.Linear,),
    'fc1_g': (nn.Linear,),
    'fc1_x': (nn.Linear,),
    'fc2': (nn.Linear,),
    'norm': (nn.Identity, nn.LayerNorm, LayerNorm),
    'drop1': (nn.Dropout, nn.Identity),
    'drop2': (nn.Dropout, nn.Identity),
}


def method_of(model_name: str) -> str | None:
    """Key of `METHODS` of one of this package's models, None of any other."""
    if not timm.models.is_model_in_modules(model_name, OWN_MODULES):
        return None
    method = model_name.partition('.')[0].rpartition('_')[2]
    return method if method in METHODS else None


def timms_class(module: nn.Module) -> type:
    """The class of timm that a module is, or that one of ours builds on."""
    mro = type(module).__mro__
    return next((kind for kind in mro if kind.__module__.startswith('timm.')), mro[0])


def put_layers(
    model: Any,
    method: str,
    config: MoeConfig,
    moe_layers: str | Sequence[int],
    dense: Callable[[], nn.Module],
    how: Upcycling | None = None,
) -> dict[str, str]:
    """Changes a model, or leaves it as it is; returns which tensors were made of which.

    Experts are made of the MLPs by `how`, or drawn. `dense` makes what reads the model's images.
    """
    raw_patches = _read_patches(model, method, config, dense)
    prefix_tokens = getattr(model, 'num_prefix_tokens', 0)
    host = Host(num_patches(model) + prefix_tokens, prefix_tokens, model.in_chans, raw_patches)
    built: dict[int, MoeLayer] = {}
    copied: dict[str, str] = {}
    for i in resolve_moe_layers(moe_layers, len(model.blocks)):
        name = f'blocks.{i}.mlp'
        mlp = _mlp_of(model.blocks[i], name)
        built[i] = _layer_like(mlp, method, config, host, model)
        if how is not None:
            made = upcycle(mlp.state_dict(), built[i].experts, how, name, built[i].summands)
            built[i].experts.load_state_dict(made)
            for key in made:
                trains = mlp.get_parameter(key).requires_grad
                built[i].experts.get_parameter(key).requires_grad_(trains)
            copied |= {f'{name}.experts.{key}': f'{name}.{key}' for key in made}
    # nothing is refused from here on
    for i, layer in built.items():
        model.blocks[i].mlp = layer
    if raw_patches is not None:
        # stem and blocks of the same weights also hand over raw patches
        model.patch_embed.__class__ = RawPatchEmbed
        model.patch_embed.raw_patches = raw_patches
        if isinstance(raw_patches.read, nn.Module):  # which becomes a part of the stem
            model.patch_embed.reader = raw_patches.read
        for block in model.blocks:
            block.raw_patches, block.__class__ = raw_patches, RawPatchBlock
            block.grad_checkpointing = model.grad_checkpointing
        model.grad_checkpointing = False
        if isinstance(raw_patches.read, ImageReader):
            raw_patches.read.train(model.training)
            copied |= {f'{READER}{NETWORK}{k}': k for k in raw_patches.read.network.state_dict()}
    if how is None:
        scale_fresh_experts(model)
    return copied


def _read_patches(model: Any, method: str, config: MoeConfig, dense: Any) -> Any:
    """The raw patches of a model, if the method looks at them."""
    if METHODS[method].read_patches is None:
        return None
    stem = _stem(model)
    kind, allowed = type(stem).__name__, f'PatchEmbed, as {method} reads it'
    check(type(stem) is PatchEmbed, 'embed_layer', kind, allowed)
    for block in model.blocks:
        allowed = f'Block of a VisionTransformer, as {method} looks at raw patches'
        check(type(block) is Block, 'block_fn', type(block).__name__, allowed)
    host = timms_class(model)
    alike = host is VisionTransformer or not METHODS[method].needs_features
    check(alike, 'model', host.__name__, f'a VisionTransformer, by which {method} reads images')
    factory = {'device': stem.proj.weight.device, 'dtype': stem.proj.weight.dtype}
    return RawPatches(METHODS[method].reader(config, dense, **factory))


def _stem(model: Any) -> Any:
    return model.embeds if isinstance(model, NaFlexVit) else model.patch_embed


def num_patches(model: Any) -> int:
    """Of an image of the size that the model is made for."""
    stem = _stem(model)
    grid = stem.pos_embed_grid_size if isinstance(model, NaFlexVit) else stem.grid_size
    return math.prod(grid)


def image_size(model: Any) -> tuple[int, ...]:
    """Height and width of the images that a model is made for."""
    stem = _stem(model)
    if not isinstance(model, NaFlexVit):
        return tuple(stem.img_size)
    return tuple(n * p for n, p in zip(stem.pos_embed_grid_size, stem.patch_size, strict=True))


def _layer_like(mlp: Any, method: str, config: MoeConfig, host: Host, model: Any) -> MoeLayer:
    """MoE layer of a method with experts that are like an MLP of a model."""
    hidden, width, weight = mlp.fc2.in_features, mlp.fc2.out_features, mlp.fc2.weight
    if (ratio := config.expert_mlp_ratio) is not None:
        hidden = int(width * ratio)
        check(hidden >= 1, 'expert_mlp_ratio', ratio, 'wide enough for one hidden feature')
    factory = {'device': weight.device, 'dtype': weight.dtype}
    act, bias, drop = partial(copy.deepcopy, mlp.act), mlp.fc2.bias is not None, _rate(mlp.drop1)
    like = {'gate': gate_of(mlp), 'norm_eps': getattr(mlp.norm, 'eps', None), **factory}
    sizes, recompute = (config.num_experts, width, hidden), config.recompute
    experts = Experts(*sizes, act, bias, drop, recompute, **like)
    mode = getattr(model, 'weight_init_mode', None)  # an Eva has no such option
    if mode or (mode is not None and experts.gate):
        draw_as(experts, mode)
        for linear in (*experts.first_layers(), experts.fc2):
            linear.init_weights()
    layer = METHODS[method].build(width, config, experts, host, **factory)
    dropped = getattr(getattr(model, 'patch_drop', None), 'prob', 0.0)
    anywhere = layer.permutation_equivariant or dropped == 0
    check(anywhere, 'patch_drop_rate', dropped, f'0, {method} needs all patches in their places')
    # torch.fx, which timm's feature extraction uses, takes it as one operation
    register_notrace_module(type(layer))
    return layer.train(mlp.training)


def _mlp_of(block: nn.Module, name: str) -> Any:
    """The MLP of a block, of which experts can be made; any other is refused."""
    mlp: Any = getattr(block, 'mlp', None)
    allowed = "timm's Mlp, GluMlp or SwiGLU, whose layouts experts have"
    check(type(mlp) in MLPS.values(), name, type(mlp).__name__, allowed)
    for part, kinds in _PARTS.items():
        found = type(getattr(mlp, part, None))
        allowed = f'{" or ".join(kind.__name__ for kind in kinds)} itself, as experts have'
        check(not hasattr(mlp, part) or found in kinds, f'{name}.{part}', found.__name__, allowed)
    rates = _rate(mlp.drop1), _rate(mlp.drop2)
    check(rates[0] == rates[1], f'{name} drop', rates, 'the same in both layers')
    return mlp


def gate_of(mlp: Any) -> str | None:
    """Where an MLP, or experts, have their gate, as `Experts` names it."""
    if isinstance(mlp, GluMlp):
        return 'last' if mlp.gate_last else 'first'
    return 'separate' if isinstance(mlp, SwiGLU) else mlp.gate if isinstance(mlp, Experts) else None


def _rate(drop: nn.Module) -> float:
    """Of a layer that drops, or of what stands in its place and drops nothing."""
    return float(getattr(drop, 'p', 0.0))


@torch.no_grad()
def scale_fresh_experts(model: Any) -> None:
    """Scale the output layers of experts that were just drawn, if timm does so with MLPs."""
    if not (isinstance(model, Eva | Beit) or getattr(model, 'fix_init', False)):
        return
    for i, block in enumerate(model.blocks):
        if isinstance(block.mlp, MoeLayer):
            block.mlp.experts.fc2.weight.div_(output_scale(i))


def output_scale(block: int) -> float:
    """What timm divides the output layers of a block by when it scales them by depth."""
    return float((2.0 * (block + 1)) ** 0.5)


def draw_as(experts: Experts, weight_init: str) -> None:
    """Lets experts be drawn as timm draws MLPs."""
    # of which timm asks whether it is of an MLP
    draw: Any = partial(get_init_weights_vit(weight_init), name='mlp')
    layers = [*experts.first_layers(), experts.fc2]
    for layer in layers:
        layer.draw = draw if weight_init else None
    if experts.gate and weight_init != 'reset':
        layers[0].draw = partial(_draw_gate, draw, GluMlp if layers[1] is experts.fc2 else SwiGLU)


def _draw_gate(draw: Callable[[nn.Linear], None], kind: Any, linear: nn.Linear) -> None:
    """Draw a layer with a gate as timm does, which draws all of it and then a part anew."""
    draw(linear)
    kind.init_weights(SimpleNamespace(fc1=linear, fc1_g=linear))


def resolve_moe_layers(moe_layers: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """Indices of the blocks that hold an MoE layer."""
    allowed = f"'all', 'everyN', 'lastN', or block indices, that select blocks of depth={depth}"
    chosen: Sequence[int] = ()
    if isinstance(moe_layers, str):
        every = 'every1' if moe_layers == 'all' else moe_layers
        match = re.fullmatch(r'(every|last)([1-9]\d*)', every)
        every_second = range(depth)[1::2]
        if match and match[1] == 'every':
            chosen = range(depth)[int(match[2]) - 1 :: int(match[2])]
        elif match and int(match[2]) <= len(every_second):
            chosen = every_second[-int(match[2]) :]
    elif isinstance(moe_layers, Sequence) and all(type(i) is int for i in moe_layers):
        chosen = sorted({*moe_layers})
    possible = len(chosen) > 0 and all(0 <= i < depth for i in chosen)
    check(possible, 'moe_layers', moe_layers, allowed)
    return tuple(chosen)


def check_method(method: Any, field: str = 'method') -> None:
    """Refuse a method that there is not."""
    check(method in [*METHODS], field, method, f'one of {", ".join(METHODS)}')


def moe_options(method: str) -> set[str]:
    """Names of the arguments that a model of a method has beyond timm's."""
    return {'moe_layers', *METHODS[method].config.option_names()}
