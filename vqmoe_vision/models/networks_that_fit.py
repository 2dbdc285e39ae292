"""Arguments of timm's classes with which a network would have the tensors of a checkpoint.

Names and shapes tell arguments. A network is built with them, without memory, and only if it has
the tensors of the checkpoint, and no others, the arguments are said to fit. Heads and last norms
are left out, and so are experts, of which `options_that_fit` knows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.layers import Mlp
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.vision_transformer import Attention, Block
from torch import nn

from ..moe import moe_layers
from ..moe.raw_patches import RawPatchBlock
from .arguments import FAILURES
from .feature_network import READER, FeatureViT
from .hosts import timms_class
from .layers import mlp_ratio_of
from .state_dicts import CLASSIFIERS, HEADS, StateDict, block_of, is_square, layer_of, shorten
from .structure import structure_only
from .would_fit import EVA, NORMS, STEM, VIT, Arguments, in_words, pooling_of

Shapes = dict[str, tuple[int, ...]]
# What experts cannot stand in the place of.
_DENSE = ('scale_mlp', 'swiglu_mlp')


@dataclass(frozen=True)
class Model:
    """What the names and shapes of a model do not tell."""

    network: nn.Module
    heads: int
    same_heads: bool
    whole: bool
    options: str = ''

    @classmethod
    def of(cls, network: Any, same_heads: bool = False, options: str = '') -> Model:
        """Of a vision transformer."""
        block = network.blocks[0]
        heads = getattr(getattr(block, 'attn', block), 'num_heads', 0)
        # features of fewer blocks would be others
        with_head = any(name.startswith(CLASSIFIERS) for name in network.state_dict())
        whole = isinstance(network, FeatureViT) or with_head
        return cls(network, heads, same_heads, whole, options)

    @property
    def arguments(self) -> Arguments:
        """Of its class, by which it has tensors."""
        return EVA if isinstance(self.network, Eva) else VIT


@dataclass(frozen=True)
class Found:
    """What is known of a network for a checkpoint."""

    options: dict[str, Any] = field(default_factory=dict)
    lacking: tuple[str, ...] = ()
    heads: str = ''

    def __str__(self) -> str:
        """For the end of a line; empty if nothing is known."""
        if self.lacking:
            return (
                f'; the checkpoint is incomplete, of the network that the rest is of it lacks '
                f'{shorten(self.lacking)}: whole weights would fit'
            )
        return f'; {in_words(self.options)}{self.heads} would fit' if self.options else ''


def network_that_fits(model: Model, state: StateDict, positions: int | None = None) -> Found:
    """With which arguments a model would have the tensors of a checkpoint."""
    expected, kind = model.network.state_dict(), model.arguments
    ours, theirs = _told(expected, kind), _told(state, kind, positions)
    own = _built(model, expected, ours) if ours and theirs else None
    built = _built(model, expected, theirs) if own is not None else None
    if own is None or built is None:
        return Found()
    routed = {layer_of(name) for name in (*state, *expected) if '.mlp.experts.' in name}
    theirs_alone = {layer_of(name) for name in state if '.mlp.experts.' in name}
    network, found = (_of_network(x, theirs_alone) for x in (built, _shapes(state)))
    # something of either that no argument makes
    alien = _of_network(_shapes(expected), routed).keys() - own.keys()
    if alien or not found.items() <= network.items():
        return Found()
    lacking = tuple(name for name in network if name not in found)
    if lacking:
        return Found(lacking=lacking if _is_torn(lacking, found) else ())
    options = _differing(model, ours, theirs, pooling_of(state, kind))
    impossible = None in options.values() or (
        bool(moe_layers(model.network)) and any(name in options for name in _DENSE)
    )
    if impossible:
        return Found()
    return Found(options, heads=_heads(model, ours, theirs))


def _told(state: StateDict, kind: Arguments, positions: int | None = None) -> dict[str, Any]:
    """Arguments that names and shapes tell; empty if the width of tokens is not among them."""
    tokens = [state[name] for name in ('cls_token', 'reg_token', 'pos_embed') if name in state]
    odd = any(value.ndim != 3 for value in tokens) or any(0 in v.shape for v in state.values())
    if odd or STEM not in state or state[STEM].ndim != 4:
        return {}
    width = state[STEM].shape[0]
    blocks = {int(name.split('.')[1]) for name in state if block_of(name)}
    told: dict[str, Any] = {'embed_dim': width, 'depth': max(blocks, default=-1) + 1}
    if state[STEM].shape[1] != 3:  # timm fits three channels to any number
        told['in_chans'] = state[STEM].shape[1]
    first = re.compile(r'blocks\.\d+\.mlp\.fc1(_g)?\.weight')
    mlp = next((v for name, v in state.items() if first.fullmatch(name) and v.ndim == 2), None)
    if mlp is not None:
        told['mlp_ratio'] = mlp_ratio_of(mlp.shape[0], width)
    for pattern, present, absent in kind:
        there = any(re.search(pattern, name) for name in state)
        told |= present if there else absent if absent is not None else {}
    if 'reg_token' in state:
        told['num_reg_tokens' if kind is EVA else 'reg_tokens'] = state['reg_token'].shape[1]
        told['no_embed_class'] = not _all_have_positions(state, positions)
    norm = next((v for name, v in state.items() if name.endswith('.q_norm.weight')), None)
    if norm is not None and norm.ndim == 1 and norm.shape[0]:
        told['num_heads'] = width // norm.shape[0]
    return told


def _all_have_positions(state: StateDict, positions: int | None) -> bool:
    """Whether a grid is left of the positions if class token and registers have each one too."""
    known = state['pos_embed'].shape[1] if 'pos_embed' in state else 0
    count = known if positions is None else positions
    tokens = [state[name].shape[1] for name in ('cls_token', 'reg_token') if name in state]
    return not is_square(count) and is_square(count - sum(tokens))


def _built(model: Model, expected: StateDict, told: dict[str, Any]) -> Shapes | None:
    """Tensors of a dense network of the model's parts and of told arguments; None without one."""
    network: Any = model.network
    patch = tuple(expected[STEM].shape[-2:])
    block, width = network.blocks[0], told.get('embed_dim', 0)
    own = next((x.num_heads for x in block.modules() if hasattr(x, 'num_heads')), 1)
    base = {
        'img_size': patch, 'patch_size': patch, 'num_classes': 0, 'global_pool': 'avg',
        'num_heads': own if width % own == 0 else 1,
    }  # fmt: skip
    attention = type(getattr(block, 'attn', None))
    if isinstance(network, Eva):
        base['use_post_norm'] = isinstance(block, EvaBlockPostNorm)
        base['attn_type'] = 'rope' if attention.__name__ == 'AttentionRope' else 'eva'
    else:
        kind = type(block)
        base['block_fn'] = Block if kind is RawPatchBlock else kind
        if attention not in (Attention, type(None)):
            base['attn_layer'] = attention
        mlps = (type(b.mlp) for b in network.blocks if hasattr(b, 'mlp') and not _routed(b.mlp))
        base['mlp_layer'] = next(mlps, Mlp)
    try:
        with structure_only():
            made: nn.Module = timms_class(network)(**base | told)
    except FAILURES:
        return None
    return _shapes(made.state_dict())


def _routed(mlp: nn.Module) -> bool:
    return hasattr(mlp, 'experts')


def _shapes(state: Mapping[str, Any]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state.items()}


def _of_network(shapes: Shapes, routed: set[str]) -> Shapes:
    """Of which shapes what has to agree: positions are resized, and so are patches."""
    free = (*HEADS, *NORMS, READER, 'rope', 'mask_token')
    return {
        name: () if name == 'pos_embed' else shape[:2] if name == STEM else shape
        for name, shape in shapes.items()
        if not name.startswith(free) and layer_of(name) not in routed
    }


def _is_torn(lacking: Iterable[str], found: Iterable[str]) -> bool:
    """Whether most blocks have what some lack; what few have may be of another network."""
    there = Counter(map(_in_block, found))
    absent = Counter(map(_in_block, lacking))
    return any(not block_of(n) or there[_in_block(n)] >= absent[_in_block(n)] for n in lacking)


def _in_block(name: str) -> str:
    return name.removeprefix(block_of(name))


def _differing(
    model: Model, ours: dict[str, Any], theirs: dict[str, Any], pooling: dict[str, Any]
) -> dict[str, Any]:
    """What the model would need otherwise; None for what no argument does."""
    absent = ours.keys() - theirs.keys() - {'mlp_ratio', 'in_chans', 'num_heads', 'no_embed_class'}
    options = {
        name: value
        for name, value in theirs.items()
        if ours.get(name) != value and (name != 'mlp_ratio' or name in ours)
    } | dict.fromkeys(absent)
    if options.get('depth', 0) >= ours['depth'] and not model.whole:
        del options['depth']  # a backbone may end before
    if not {'reg_tokens', 'num_reg_tokens'} & options.keys():
        options.pop('no_embed_class', None)
    alone = options.get('class_token') is False
    return {'class_token': False, **pooling, **options} if alone else options


def _heads(model: Model, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """What is to say of heads beside another width: names and shapes do not tell their number."""
    width, own = theirs['embed_dim'], ours['embed_dim']
    if model.same_heads or width == own or 'num_heads' in theirs:
        return ''
    # as many as heads of the width of the model's make
    heads, rest = divmod(model.heads * width, own)
    likely = f', probably {heads},' if heads and not rest and width % heads == 0 else ''
    return f' and the num_heads of the checkpoint{likely}'
