"""The network that weights are of, beside the model that takes them.

Names and shapes of tensors do not say which function a network is: attention heads, activations,
the order of norms, rotary positions and pooling have none. Where the source names its network, it
is built without memory and compared.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import Mlp
from timm.layers.create_act import _ACT_LAYER_DEFAULT
from torch import nn

from .arguments import FAILURES
from .described import Described
from .hosts import Transformer, timms_class

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
        with torch.device('meta'):
            model = timm.create_model(described.name, **described.arguments)
    except FAILURES as error:
        raise ValueError(
            f'{source!r} is said to be of {described.name} with {described.arguments}, which timm '
            f'does not build: {error}'
        ) from error
    return Origin(described.name, model)


def refuse_other_function(model: nn.Module, origin: Origin, path: str) -> None:
    """Refuse weights whose network computes otherwise."""
    if told := _saved_with(_facts(origin.model), _facts(model)):
        raise ValueError(f'checkpoint {path!r} of {origin.name} does not fit the model: {told}')


def other_pooling(model: Any, origin: Origin) -> str:
    """How the head of a source is fed otherwise than that of the model; empty if it is not."""
    return _saved_with(_pooling(origin.model), _pooling(model))


def _saved_with(theirs: dict[str, str], ours: dict[str, str]) -> str:
    names = [name for name in theirs if name in ours and theirs[name] != ours[name]]
    before, after = (', '.join(f'{n}={facts[n]}' for n in names) for facts in (theirs, ours))
    return f'saved with {before}, the model has {after}' if names else ''


def _pooling(model: Any) -> dict[str, str]:
    after = not isinstance(getattr(model, 'fc_norm', None), nn.Identity | None)
    prefix = getattr(model, 'pool_include_prefix', False)
    known = {'global_pool': model.global_pool, 'fc_norm': after, 'pool_include_prefix': prefix}
    return {name: repr(value) for name, value in known.items()}


def _facts(network: Any) -> dict[str, str]:
    """What a network computes with, by timm's arguments where there is one."""
    rope = getattr(network, 'rope', None)
    kind = 'none' if rope is None else type(rope).__name__
    facts = {'model': timms_class(network).__name__, 'rotary positions': kind}
    if not isinstance(network, Transformer):
        return facts
    block = network.blocks[0]
    with_heads = (module for module in block.modules() if hasattr(module, 'num_heads'))
    attention: Any = next(with_heads, getattr(block, 'attn', block))
    classes = {'block_fn': timms_class(block), 'attn_layer': timms_class(attention)}
    own = {'embed_layer': timms_class(network.patch_embed), 'mlp_layer': _mlp_class(network)}
    # what a stem or an MLP of one's own computes is not known
    classes |= {name: kind for name, kind in own.items() if kind.__module__.startswith('timm.')}
    facts |= {name: kind.__name__ for name, kind in classes.items()}
    if hasattr(attention, 'num_heads'):
        facts['num_heads'] = str(attention.num_heads)
    if (act := _activation(block)) is not None:
        # by what it computes: its class may be torch's, where timm names one of its own
        named = (name for name, kind in _ACT_LAYER_DEFAULT.items() if _same(kind(), act))
        facts['act_layer'] = next(named, type(act).__name__)
    norm = _named(block, 'norm1', 'in_norm', 'norm')
    facts['eps'] = str(getattr(norm, 'eps', None))
    kinds = [base.__name__ for base in type(norm).__mro__]
    for kind in ('LayerNorm', 'RmsNorm', 'SimpleNorm'):
        if any(name.startswith(kind) for name in kinds):
            facts['norm_layer'] = kind
    for name, option in _ROTARY.items():
        if hasattr(rope, name):
            value = getattr(rope, name)  # a config.json has lists
            facts[option] = repr(tuple(value) if isinstance(value, list) else value)
    return facts


def _mlp_class(network: Any) -> type:
    """Of the MLPs that are dense, which experts are like."""
    mlps = (getattr(block, 'mlp', None) for block in network.blocks)
    return next((timms_class(mlp) for mlp in mlps if mlp and not hasattr(mlp, 'experts')), Mlp)


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
