"""Whether weights and a model are of one function.

Names and shapes of tensors say much of it. What they do not say is compared where the source does:
a config.json of timm beside them, a run of this package, or a script of timm.
"""

import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from timm.layers.create_act import _ACT_LAYER_DEFAULT
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..moe import moe_layers
from ..moe.config import MoeConfig
from ..moe.methods import METHODS
from ..moe.raw_patches import ImageReader
from .layers import Convertible, gate_of, method_of, timms_class
from .moe_vit import SparseModel

StateDict = dict[str, Tensor]
Value = TypeVar('Value')
# In `meta` of a checkpoint: what this package says of its run, as plain values.
STATED = 'vqmoe_vision'
CLASSIFIERS = ('head.', 'head_dist.')
HEADS = (*CLASSIFIERS, 'attn_pool.')
# Where timm has the last norm; that of SAM is in a neck.
NORMS = ('norm.', 'fc_norm.', 'neck.')
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
# What timm's `Eva` and files of DINOv3's authors have, where there are no absolute positions.
_OF_ROTARY = r'^rope|^storage_tokens$|\.gamma_1$|\.q_bias$'


@dataclass(frozen=True)
class Network:
    """What is known of the network that weights are of."""

    name: str = ''
    facts: Mapping[str, str] = field(default_factory=dict)  # that answers follow
    pooling: Mapping[str, str] = field(default_factory=dict)  # that a head follows
    options: MoeConfig | None = None  # of its experts
    img_size: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: Any, name: str = '') -> 'Network':
        """That of a model, which may be on the meta device."""
        sparse = isinstance(model, SparseModel)
        facts = _facts(model) | ({'method': repr(model.method)} if sparse else {})
        size = getattr(getattr(model, 'patch_embed', None), 'img_size', None) or ()
        return cls(name, facts, _pooling(model), model.moe_config if sparse else None, tuple(size))


def state_network(model: Any) -> dict:
    """What `network_of_run` reads again, in plain values."""
    own = Network.of(model)
    size = list(own.img_size) or None
    pooling = dict(own.pooling) if getattr(model, 'num_classes', None) else {}  # of no head
    stated = {'network': dict(own.facts), 'pooling': pooling, 'img_size': size}
    if own.options is None:
        return {'method': None, 'options': None, **stated}
    return {'method': model.method, 'options': own.options.effective_options(), **stated}


def stated_in(content: Any) -> dict:
    """What a checkpoint of this package says of its run; {} of others, which are asked nothing."""
    meta = content.get('meta') if isinstance(content, dict) else None
    stated = meta.get(STATED) if isinstance(meta, dict) else None
    return stated if isinstance(stated, dict) else {}


def network_of_run(content: Any) -> Network | None:
    """What the checkpoint of a run says, or what timm's train.py leaves in its own."""
    if not isinstance(content, dict):
        return None
    stated = stated_in(content)
    if not stated:
        script = vars(content['args']) if isinstance(content.get('args'), Namespace) else {}
        options = script.get('model_kwargs')
        method = method_of(str(script.get('model', content.get('arch'))))
        if method is None and isinstance(options, dict):
            method = options.get('method')
        stated = {'method': method, 'options': options}
    method, size, options = stated.get('method'), stated.get('img_size'), None
    facts, pooling = (
        dict(found) if isinstance(found := stated.get(name), dict) else {}
        for name in ('network', 'pooling')
    )
    size = tuple(size) if isinstance(size, list | tuple) else ()
    if isinstance(method, str) and method in METHODS:
        facts['method'] = repr(method)
        kind, given = METHODS[method].config, stated.get('options')
        if isinstance(given, dict):
            given = {k: v for k, v in given.items() if k in kind.option_names()}
            with suppress(TypeError, ValueError):  # of another version of this package
                options = kind.from_options(**given)
    if not facts and not size:
        return None
    return Network('', facts, pooling, options, size)


def compare(
    model: nn.Module, theirs: Network | None, path: str, whole: bool = True
) -> tuple[str, ...]:
    """Refuse weights of another function, and say which options of experts were others.

    A head that is loaded with the rest (`whole`) has to be fed as it was.
    """
    if theirs is None:
        return ()
    ours, facts = Network.of(model), dict(theirs.facts)
    if whole and getattr(model, 'num_classes', None):
        facts |= theirs.pooling
    if told := _saved_with(facts, {**ours.facts, **ours.pooling}):
        of = f' of {theirs.name}' if theirs.name else ''
        raise ValueError(f'checkpoint {path!r}{of} does not fit the model: {told}')
    before, after = theirs.options, ours.options
    if before is None or after is None or type(before) is not type(after):
        return ()
    names = before.of_weights() - {*before.unused(), *after.unused()}
    old, new = vars(before), vars(after)
    return tuple(
        f'the experts were trained with {name}={old[name]!r}, the model has {name}={new[name]!r}'
        for name in old
        if name in names and old[name] != new[name]
    )


def other_pooling(model: Any, theirs: Network | None) -> str:
    """How the head of a source is fed otherwise than that of the model; empty if it is not."""
    return _saved_with(theirs.pooling, _pooling(model)) if theirs is not None else ''


def _saved_with(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    names = [name for name in theirs if name in ours and theirs[name] != ours[name]]
    before, after = (', '.join(f'{n}={facts[n]}' for n in names) for facts in (theirs, ours))
    return f'saved with {before}, the model has {after}' if names else ''


def _pooling(model: Any) -> dict[str, str]:
    after = not isinstance(getattr(model, 'fc_norm', None), nn.Identity | None)
    prefix = getattr(model, 'pool_include_prefix', False)
    pool = getattr(model, 'global_pool', None)
    known = {'global_pool': pool, 'fc_norm': after, 'pool_include_prefix': prefix}
    return {name: repr(value) for name, value in known.items()}


def _facts(network: Any) -> dict[str, str]:
    """What a network computes with, by timm's arguments where there is one."""
    rope = getattr(network, 'rope', None)
    kind = 'none' if rope is None else type(rope).__name__
    facts = {'model': timms_class(network).__name__, 'rotary positions': kind}
    for name, option in _ROTARY.items():
        if hasattr(rope, name):
            value = getattr(rope, name)  # a config.json has lists
            facts[option] = repr(tuple(value) if isinstance(value, list) else value)
    if not isinstance(network, Convertible):
        return facts
    block = network.blocks[0]
    parts: dict = {}  # the first of each name
    for path, module in block.named_modules():
        parts.setdefault(path.rpartition('.')[2], module)
    with_heads = (module for module in block.modules() if hasattr(module, 'num_heads'))
    attention = next(with_heads, parts.get('attn', block))
    norm = next((parts[name] for name in ('norm1', 'in_norm', 'norm') if name in parts), None)
    mlp = parts.get('mlp')
    own = getattr(mlp, 'experts', mlp)
    act = getattr(own, 'act', None) if mlp else parts.get('mlp_act')
    facts |= {
        'block_fn': timms_class(block).__name__,
        'attn_layer': timms_class(attention).__name__,
        'eps': str(getattr(norm, 'eps', None)),
    }
    kinds = ('RmsNorm', 'SimpleNorm')  # of the same tensors; others have more or fewer
    if named := [kind for kind in kinds if type(norm).__name__.startswith(kind)]:
        facts['norm_layer'] = named[0]
    if gate := gate_of(own):
        facts['gate'] = gate
    if hasattr(attention, 'num_heads'):
        facts['num_heads'] = str(attention.num_heads)
    if isinstance(act, nn.Module):
        # by what it computes: its class may be torch's, where timm names one of its own
        same = (name for name, kind in _ACT_LAYER_DEFAULT.items() if _same(kind(), act))
        facts['act_layer'] = next(same, type(act).__name__)
    return facts


def _same(act: nn.Module, other: nn.Module) -> bool:
    """Whether two activations are one function: timm has several classes of some."""
    if any(True for layer in (act, other) for _ in layer.parameters()):
        return type(act) is type(other)
    with torch.no_grad():  # some work in place
        return torch.allclose(act(_POINTS.clone()), other(_POINTS.clone()), atol=1e-5, rtol=0)


def refuse_rotary(state: StateDict, model: Convertible, path: str) -> tuple[str, ...]:
    """Refuse a bare file of rotary positions; a warning where names do not tell."""
    if not isinstance(model, VisionTransformer):
        return ()
    if 'pos_embed' not in state and any(re.search(_OF_ROTARY, name) for name in state):
        raise ValueError(
            f'checkpoint {path!r} does not fit the model: it has the names of an Eva or BEiT, '
            'whose positions are rotary or relative'
        )
    doubt = (
        'it has norm_pre and attn_pool, as an Eva such as Perception Encoder, whose positions are '
        'rotary too; names do not tell it from a VisionTransformer'
    )
    # Perception Encoders have both kinds of positions, and no other names than these of a ViT
    return (doubt,) if state.keys() >= {'norm_pre.weight', 'attn_pool.latent'} else ()


def refuse_values(expected: StateDict, state: StateDict, path: str) -> None:
    """Refuse weights that are no numbers, or whole numbers where the model has real ones."""
    layers = {layer_of(name) for name in expected} - {''}  # whose dense MLPs experts are made of
    for name, value in state.items():
        if name not in expected and layer_of(name) not in layers:
            continue
        initial = expected.get(name)
        real = initial is None or initial.is_floating_point()
        if value.is_floating_point() != real:
            kind = 'real' if real else 'whole'
            raise ValueError(
                f'checkpoint {path!r} does not fit the model: {name} is {value.dtype}, not {kind}'
            )
        if not real or torch.isfinite(value.float()).all():
            continue
        # a buffer such as a mask may be built infinite
        if initial is None or initial.is_meta or initial.isfinite().all() or value.isnan().any():
            raise ValueError(f'checkpoint {path!r} is damaged: {name} has values nan or infinite')


def refuse_misfits(expected: StateDict, fitted: StateDict, path: str, whole: bool) -> None:
    """Refuse tensors that only one of both has, or in other shapes: it would be another function.

    A backbone (not `whole`) may end before its checkpoint. Free are heads, last norms, and MoE
    layers for which the checkpoint has no experts.
    """
    ours, theirs = (
        {layer_of(name) for name in part if '.mlp.experts.' in name} for part in (expected, fitted)
    )
    blocks = {_block_of(name) for name in expected}

    def matters(name: str) -> bool:
        if name.startswith((*HEADS, *NORMS)) or layer_of(name) in ours - theirs:
            return name in expected and name in fitted
        return whole or _block_of(name) in blocks

    parts = ({k: v for k, v in part.items() if matters(k)} for part in (expected, fitted))
    if problem := misfit(*parts):
        raise ValueError(f'checkpoint {path!r} does not fit the model: {problem}')


def misfit_of(model: nn.Module, state_dict: StateDict) -> str:
    """As `misfit`, of a model that is about to load a state dict."""
    state = {name.removeprefix('module.'): value for name, value in state_dict.items()}
    for layer_name, layer in moe_layers(model).items():
        prefix = f'{layer_name}.'
        for name in layer.omitted(list(part_of(state, prefix))):
            del state[prefix + name]
    expected = model.state_dict()
    for name, reader in model.named_modules():
        if isinstance(reader, ImageReader):
            own = reader.expected(part_of(state, f'{name}.'))
            expected = without(expected, f'{name}.') | below(f'{name}.', own)
    return misfit(expected, state)


_DISTILLED = (
    'they are of a distilled DeiT, which keeps its second token by '
    "vqmoe_vision.models.convert_to_moe(timm.create_model('deit_..._distilled_...'), METHOD)"
)


def misfit(expected: StateDict, state: StateDict) -> str:
    """What keeps a state dict from being loaded, in words; empty if nothing does."""
    parts = {
        'missing keys': [name for name in expected if name not in state],
        'unexpected keys': [name for name in state if name not in expected],
        'shapes': [
            f'{name} is {tuple(state[name].shape)}, the model has {tuple(value.shape)}'
            for name, value in expected.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    problems = [f'{what}: {shorten(names)}' for what, names in parts.items() if names]
    if 'dist_token' in parts['unexpected keys']:
        problems.append(_DISTILLED)
    return '; '.join(problems)


def refuse_without_values(state: Mapping, path: str, expected: Iterable[str] = ()) -> None:
    """Refuse what no parameter can take: of names of a model no tensors, sparse ones, of meta."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            if name in expected:
                raise ValueError(
                    f'checkpoint {path!r} does not fit the model: {name} is a '
                    f'{type(value).__name__}, and weights are tensors'
                )
        elif value.is_meta or value.layout is not torch.strided:
            kind = 'of the meta device' if value.is_meta else f'of {value.layout}'
            raise ValueError(f'checkpoint {path!r} has no values for {name}, which is {kind}')


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was missing, whatever was to be done with it."""
    # what torch raises on the processor has no type of its own
    of_torch = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return of_torch or isinstance(error, MemoryError | torch.OutOfMemoryError)


def part_of(state: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    """What has names under a prefix, by the rest of its names."""
    return {k[len(prefix) :]: value for k, value in state.items() if k.startswith(prefix)}


def without(state: Mapping[str, Tensor], prefixes: str | tuple[str, ...]) -> StateDict:
    """What has names under none of some prefixes."""
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


def below(prefix: str, state: Mapping[str, Value]) -> dict[str, Value]:
    """The same under a prefix."""
    return {prefix + name: value for name, value in state.items()}


def layer_of(name: str) -> str:
    """'blocks.1.mlp' of 'blocks.1.mlp.router.weight', and nothing of what is not in an MLP."""
    layer, found, _ = name.partition('.mlp.')
    return f'{layer}.mlp' if found else ''


def _block_of(name: str) -> str:
    return ''.join(re.findall(r'^blocks\.\d+\.', name))


def shorten(names: Iterable[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more
