"""The network that weights are of, beside the model that takes them.

Names and shapes of tensors do not say which function a network is: attention heads, activations,
the order of norms, rotary positions and pooling have none. Where the source names its network, it
is built without memory and compared.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import Mlp
from timm.layers.create_act import _ACT_LAYER_DEFAULT
from timm.models.eva import Eva
from timm.models.vision_transformer import ATTN_LAYERS, VisionTransformer
from torch import nn

from .arguments import FAILURES
from .convert import convert_to_moe
from .described import Described
from .hosts import timms_class
from .structure import structure_only

_logger = logging.getLogger(__name__)
# Where activations are compared: of those that timm names, no two agree in all these points.
_POINTS = torch.linspace(-8.0, 8.0, 65)

# What rotary positions are made of beside weights, and the arguments of timm's `Eva` for it.
_ROTARY = {
    'temperature': 'rope_temperature',
    'rotate_half': 'rope_rotate_half',
    'grid_offset': 'rope_grid_offset',
    'grid_indexing': 'rope_grid_indexing',
    'ref_feat_shape': 'ref_feat_shape',
    'mrope_section': 'rope_mrope_section',
}


@dataclass(frozen=True)
class Origin:
    """The network of a source."""

    name: str
    model: Any


def origin_of(described: Described, source: str) -> Origin | None:
    """The network that a source describes."""
    if not described.name:
        return None
    if not timm.is_model(described.name):
        told = '%s is of %r, which this timm does not know: its architecture was not compared'
        _logger.warning(told, source, described.name)
        return None
    try:
        with structure_only():
            model = timm.create_model(described.name, **described.arguments)
    except FAILURES as error:
        raise ValueError(
            f'{source!r} is said to be of {described.name} with {described.arguments}, which timm '
            f'does not build: {error}'
        ) from error
    return Origin(described.name, model)


def refuse_other_function(model: nn.Module, origin: Origin, path: str) -> None:
    """Refuse weights whose network computes otherwise."""
    ours, theirs = timms_class(model), timms_class(origin.model)
    differences: list[tuple[str, str]] = []
    if ours is not theirs:
        rotary = ', whose positions are rotary' if theirs is Eva else ''
        article = 'an' if theirs.__name__[0] in 'AEIOU' else 'a'
        differences.append((f'{article} {theirs.__name__}{rotary}, for a {ours.__name__}', ''))
    else:
        differences += _differences(model, origin.model)
    if not differences:
        return
    what = '; '.join(text for text, _ in differences)
    raise ValueError(
        f'checkpoint {path!r} does not fit the model: it is of {origin.name}, {what}'
        f'{_remedy(model, origin, [option for _, option in differences])}'
    )


def _remedy(model: Any, origin: Origin, options: Sequence[str]) -> str:
    """What would fit: options, if they do for all that differs, or the network by its own name."""
    attention = _attention_option(model, origin.model)
    if options.count('') == 1 and attention:
        options = [option or attention for option in options]
    if timms_class(origin.model) not in (VisionTransformer, Eva):
        return "; experts are for timm's VisionTransformer and Eva alone"
    if hasattr(model, 'method') and _no_experts_of(origin.model, model.method):
        return with_experts(origin, model.method)  # whatever options the model has
    if all(options):
        return f'; {", ".join(options)} would fit'
    if hasattr(origin.model, 'method'):  # it has experts
        return ''
    with structure_only():
        named = timm.create_model(origin.name)
    # sizes are arguments of the model that takes the weights, others make it another network
    changed = [option for _, option in _differences(named, origin.model)]
    if not all(option.startswith('num_heads=') for option in changed):
        return ''
    if not hasattr(model, 'method'):
        return f'; model_name={origin.name!r} is that network'
    return with_experts(origin, model.method)


def with_experts(origin: Origin, method: str) -> str:
    """What makes experts of a network, or why nothing does, for the end of a line."""
    if reason := _no_experts_of(origin.model, method):
        return f'; no experts can be made of it: {reason}'
    return (
        f'; model_name={origin.name!r} with moe=dict(method={method!r}) is that network with '
        'experts, and so is what convert_to_moe makes of it'
    )


def _no_experts_of(dense: nn.Module, method: str) -> str:
    """Why `convert_to_moe` refuses a network; empty if it does not, or has nothing to do."""
    if hasattr(dense, 'method'):
        return ''
    try:
        convert_to_moe(copy.deepcopy(dense), method, moe_layers=[0])
    except ValueError as error:
        return str(error)
    return ''


def _attention_option(model: Any, origin: Any) -> str:
    """The option of an attention that timm has a name for, where it differs in equal blocks."""
    ours, theirs = model.blocks[0], origin.blocks[0]
    if timms_class(ours) is not timms_class(theirs):
        return ''
    mine, other = (timms_class(_attention(block)) for block in (ours, theirs))
    names = [name for name, layer in ATTN_LAYERS.items() if layer is other and name]
    return f'attn_layer={names[0]!r}' if names and mine is not other else ''


def other_pooling(model: Any, origin: Origin) -> str:
    """How the head of a source is fed otherwise than that of the model; empty if it is not."""
    ours, theirs = _pooling(model), _pooling(origin.model)
    return '' if ours == theirs else theirs


def _pooling(model: Any) -> str:
    """Arguments that say how the features of a head are pooled."""
    pool, after = model.global_pool, _norm_after(model)
    norm = '' if after == (pool in ('avg', 'avgmax', 'max')) else f', fc_norm={after}'
    prefix = ', pool_include_prefix=True' if getattr(model, 'pool_include_prefix', False) else ''
    return f'global_pool={pool!r}{norm}{prefix}'


def _norm_after(model: Any) -> bool:
    return not isinstance(getattr(model, 'fc_norm', None), nn.Identity | None)


def _differences(model: Any, origin: Any) -> list[tuple[str, str]]:
    """In what the blocks compute otherwise, in words, and the options that would fit."""
    ours, theirs = model.blocks[0], origin.blocks[0]
    mine, other = (timms_class(network.patch_embed) for network in (model, origin))
    found = []
    if _are_two_of_timm(mine, other):
        found.append((f'whose stem is {other.__name__}, for {mine.__name__}', ''))
    mine, other = timms_class(ours), timms_class(theirs)
    if mine is not other:
        option = (
            f'block_fn={other.__name__} of {other.__module__}' if hasattr(theirs, 'mlp') else ''
        )
        return [*found, (f'whose blocks are {other.__name__}, for {mine.__name__}', option)]
    mine, other = _mlp_class(model), _mlp_class(origin)
    if _are_two_of_timm(mine, other):
        gated = ', gated ones (SwiGLU)' if 'GLU' in other.__name__.upper() else ''
        found.append((f'whose MLPs are {other.__name__}{gated}, for {mine.__name__}', ''))
    attn, given_attn = _attention(ours), _attention(theirs)
    mine, other = timms_class(attn), timms_class(given_attn)
    if mine is not other:
        found.append((f'whose attention is {other.__name__}, for {mine.__name__}', ''))
    # an attention of one's own may have none to compare
    heads, given = (getattr(module, 'num_heads', None) for module in (attn, given_attn))
    if None not in (heads, given) and heads != given:
        found.append((f'which has {given} heads, for {heads}', f'num_heads={given}'))
    act, given_act = _activation(ours), _activation(theirs)
    if act is not None and given_act is not None and not _same(act, given_act):
        # by what it computes: its class may be torch's, where timm names one of its own
        named = (name for name, kind in _ACT_LAYER_DEFAULT.items() if _same(kind(), given_act))
        name = next(named, None)
        option = f'act_layer={name!r}' if name else ''
        kinds = [type(layer).__name__ for layer in (given_act, act)]
        found.append((f'whose activation is {kinds[0]}, for {kinds[1]}', option))
    norms = [_named(block, 'norm1', 'in_norm', 'norm') for block in (ours, theirs)]
    eps, given_eps = (getattr(norm, 'eps', None) for norm in norms)
    kinds = [_norm_kind(norm) for norm in norms]
    option = f'norm_layer=partial({type(norms[1]).__name__}, eps={given_eps})'
    if '' not in kinds and kinds[0] != kinds[1]:
        found.append((f'whose norms are {kinds[1]}, for {kinds[0]}', option))
    elif eps != given_eps:
        found.append((f'whose norms have eps={given_eps}, for {eps}', option))
    return found + _rotary_differences(getattr(model, 'rope', None), getattr(origin, 'rope', None))


def _are_two_of_timm(mine: type, other: type) -> bool:
    """Whether classes are known to compute otherwise; what one of a user's own does is not."""
    return mine is not other and all(k.__module__.startswith('timm.') for k in (mine, other))


def _mlp_class(network: Any) -> type:
    """Of the MLPs that are dense, which experts are like."""
    mlps = (getattr(block, 'mlp', None) for block in network.blocks)
    return next((timms_class(mlp) for mlp in mlps if mlp and not hasattr(mlp, 'experts')), Mlp)


def _norm_kind(norm: Any) -> str:
    """What a norm computes, by the name that timm has for it; empty if that is not known."""
    if isinstance(norm, nn.LayerNorm):
        return 'LayerNorm'
    return next((n for n in ('RmsNorm', 'SimpleNorm') if type(norm).__name__.startswith(n)), '')


def _rotary_differences(ours: Any, theirs: Any) -> list[tuple[str, str]]:
    """As `_differences`, of rotary positions; their grid is that of the images."""
    if type(ours) is not type(theirs):
        kinds = ['none' if x is None else type(x).__name__ for x in (theirs, ours)]
        return [(f'whose rotary positions are {kinds[0]}, for {kinds[1]}', '')]
    found = []
    for name, option in _ROTARY.items():
        values = (getattr(x, name, None) for x in (ours, theirs))
        # a config.json has lists
        own, given = (tuple(value) if isinstance(value, list) else value for value in values)
        if own != given:
            text = f'whose rotary positions have {name}={given!r}, for {own!r}'
            found.append((text, f'{option}={given!r}'))
    return found


def _attention(block: Any) -> Any:
    """What has the heads: the block itself, where it computes the MLP beside them."""
    with_heads = (module for module in block.modules() if hasattr(module, 'num_heads'))
    return next(with_heads, getattr(block, 'attn', block))


def _activation(block: Any) -> nn.Module | None:
    mlp = _named(block, 'mlp')
    layers = getattr(mlp, 'experts', mlp)
    act = _named(block, 'mlp_act') if mlp is None else getattr(layers, 'act', None)
    return act if isinstance(act, nn.Module) else None


def _named(block: nn.Module, *names: str) -> Any:
    """The first module with the first of these names that there is; None without any."""
    found: dict[str, nn.Module] = {}
    for path, module in block.named_modules():
        found.setdefault(path.rpartition('.')[2], module)
    return next((found[name] for name in names if name in found), None)


def _same(act: nn.Module, other: nn.Module) -> bool:
    """Whether two activations are one function: timm has several classes of some."""
    if any(True for layer in (act, other) for _ in layer.parameters()):
        return type(act) is type(other)
    with torch.no_grad():  # some work in place
        return torch.allclose(act(_POINTS.clone()), other(_POINTS.clone()), atol=1e-5, rtol=0)
