"""Weights from elsewhere for a vision transformer: fitted, and nothing lost in silence.

Everything here works on state dicts; `engine/checkpoint.py` reads the files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models import adapt_input_conv, eva, vision_transformer
from timm.models.eva import Eva
from torch import nn

from ..moe import moe_layers
from ..moe.config import check
from ..moe.image_reader import ImageReader, image_reader
from .feature_network import NETWORK, READER, FeatureViT
from .foreign_names import from_mmseg, is_of_mmseg
from .hosts import Transformer
from .origin import Origin, other_pooling, refuse_other_function
from .refusals import (
    EVA,
    VIT,
    pooled_otherwise,
    refuse_gated,
    refuse_misfits,
    refuse_other_parts,
    refuse_other_tokens,
    refuse_values,
)
from .state_dicts import CLASSIFIERS, HEADS, Report, StateDict, misfit, other_shapes, shorten
from .upcycle import Upcycling, upcycle

Size = tuple[int, int]
# Where the keys of a vision transformer begin: in a segmentation run, in a classification run (or
# in a backbone alone), in a run of mmseg's own backbone, in rstrudel/segmenter, in timm.
_PREFIXES = ('backbone.model.', 'model.', 'backbone.', 'encoder.', '')
_STEM = 'patch_embed.proj.weight'


def fit_state(
    model: Transformer, state_dict: StateDict, path: str, image_sizes: Sequence[Size] = ()
) -> tuple[StateDict, list[str]]:
    """The part of a checkpoint that belongs into a model, resized where that can be done.

    The experts of a layer stay as they are if the checkpoint has a dense MLP for them; `transfer`
    makes them of it.

    Args:
        model: Position and patch embeddings are resized to its sizes; its MoE layers fit theirs.
        state_dict: Of a segmentation or classification run, of timm, of mmseg, or of the authors
            of Segmenter.
        path: Where it came from, for messages.
        image_sizes: Of which one may be the size of the images that its positions belong to.

    Returns:
        State dict to load, and lines for the log: what was loaded, resized, missing or unused.

    Raises:
        ValueError: Nothing matches, or the checkpoint is of another size or method.
    """
    state, report = transfer(model, state_dict, path, image_sizes)
    return state, [f'{path}: {line}' for line in report.lines()]


def transfer(
    model: Transformer,
    state_dict: StateDict,
    path: str,
    image_sizes: Sequence[Size] = (),
    upcycling: Upcycling | None = None,
    origin: Origin | None = None,
) -> tuple[StateDict, Report]:
    """The part of a checkpoint that belongs into a model, and what becomes of each tensor.

    A classifier takes the checkpoint's head if it has the same classes by number and pools its
    features alike, and keeps the one that it was initialised with otherwise. Nothing else may be
    missing but what a dense model does not have: routers, codebooks, slots.

    Args:
        model: As in `fit_state`. It is not changed.
        state_dict: As in `fit_state`.
        path: As in `fit_state`.
        image_sizes: As in `fit_state`.
        upcycling: How experts are made of a dense MLP; with None they stay as they are.
        origin: The network that the checkpoint is of, if that is known.

    Returns:
        State dict to load, without what stays as initialised, and the report.

    Raises:
        ValueError: Nothing matches, the checkpoint is of another size, method or architecture, or
            has values that are none; names what does not fit and what would.
    """
    expected = model.state_dict()
    on_meta = any(value.is_meta for value in expected.values())
    check(not on_meta, 'device', 'meta', f'one with memory for the weights of {path!r}')
    if origin is not None:
        refuse_other_function(model, origin, path)
    state, outside = _strip(state_dict, expected, path)
    reader = image_reader(model)
    if reader is None:
        return _fit_network(model, state, expected, outside, path, image_sizes, upcycling, origin)
    part = {k[len(READER) :]: v for k, v in state.items() if k.startswith(READER)}
    state, expected = (
        {k: v for k, v in names.items() if not k.startswith(READER)} for names in (state, expected)
    )
    result, report = _fit_network(
        model, state, expected, outside, path, image_sizes, upcycling, origin
    )
    read, more = _fit_reader(reader, part, state, path, image_sizes)
    return result | read, report.joined(more)


def load_features(
    model: nn.Module, state_dict: StateDict, path: str, image_sizes: Sequence[Size] = ()
) -> Report:
    """Loads what a model reads images with; whatever was fitted to other features is void.

    Args:
        model: Any model whose method reads images by a frozen network; only that part is changed.
        state_dict: Of a dense model of the shape of that network, as in `fit_state`.
        path: As in `fit_state`.
        image_sizes: As in `fit_state`.

    Raises:
        ValueError: The model reads no images, the state is of a model with experts, or as
            `transfer`.
    """
    reader = image_reader(model)
    check(reader is not None, 'model', type(model).__name__, 'a model that reads images')
    assert reader is not None
    if any('.mlp.experts.' in name for name in state_dict):
        raise ValueError(f'checkpoint {path!r} has experts; images are read by a dense model')
    network: Any = reader.network
    state, report = transfer(network, state_dict, path, image_sizes)
    network.load_state_dict(state, strict=False)
    reader.fitted.fill_(False)
    return report


def _fit_network(
    model: Transformer,
    state: StateDict,
    expected: StateDict,
    outside: tuple[str, ...],
    path: str,
    image_sizes: Sequence[Size],
    upcycling: Upcycling | None,
    origin: Origin | None,
) -> tuple[StateDict, Report]:
    """As `transfer`, of all but what reads images, by timm's names."""
    arguments = EVA if isinstance(model, Eva) else VIT
    refuse_other_tokens(state, expected, path, arguments)
    pooling = (origin and other_pooling(model, origin)) or pooled_otherwise(expected, state)
    state, remarks = _rename_norm(state, expected)
    state, network, dropped, head, warnings = _fit_head(state, expected, pooling)
    positions = _resized_positions(state, model, path, image_sizes)
    filtered = _in_names_of(model, {**state, **positions})
    filtered |= positions  # timm takes them for those of the model's default size and resizes again
    filtered |= _fitted_stem(filtered, network)
    fitted = _fit_layers(filtered, model)
    refuse_gated(network, filtered, path)
    refuse_misfits(network, filtered, fitted, path)
    # features of fewer blocks would be others
    whole = isinstance(model, FeatureViT) or any(name.startswith(CLASSIFIERS) for name in expected)
    refuse_other_parts(network, fitted, path, whole, arguments)
    refuse_values(network, filtered, path)
    made, copied = _upcycled(model, fitted, path, upcycling) if upcycling else ({}, {})
    result = {name: value for name, value in fitted.items() if name in network} | made
    resized = {
        name: (tuple(state[name].shape), tuple(value.shape))
        for name, value in result.items()
        if name in state and state[name].shape != value.shape
    }
    used = {*result, *copied.values()}
    return result, Report(
        loaded=tuple(k for k in result if k not in resized and k not in copied),
        resized=resized,
        copied=copied,
        initialised=tuple(k for k in expected if k not in result),
        unused=tuple(k for k in filtered if k not in used),
        outside=(*outside, *dropped),
        remarks=(*remarks, *head),
        warnings=warnings,
    )


def _fit_reader(
    reader: ImageReader, part: StateDict, rest: StateDict, path: str, image_sizes: Sequence[Size]
) -> tuple[StateDict, Report]:
    """What reads images as the checkpoint does, or with the weights of a dense one.

    Args:
        reader: Of the model.
        part: Of the checkpoint, what reads images in it, by names in `reader`.
        rest: Of the checkpoint.
        path: As in `fit_state`.
        image_sizes: As in `fit_state`.
    """
    weights = {k[len(NETWORK) :]: v for k, v in part.items() if k.startswith(NETWORK)}
    result = {READER + k: v for k, v in part.items() if not k.startswith(NETWORK)}
    expected = {READER + k: v for k, v in reader.state_dict().items()}
    if shapes := other_shapes(expected, result):
        raise ValueError(f'checkpoint {path!r} is of another size: {shorten(shapes)}')
    read = Report()
    if part or not any('.mlp.experts.' in name for name in rest):
        network: Any = reader.network
        fitted, read = transfer(network, weights or rest, path, image_sizes)
        result |= {READER + NETWORK + k: v for k, v in fitted.items()}
    resized = {READER + NETWORK + k: shapes for k, shapes in read.resized.items()}
    copied = {} if part else {READER + NETWORK + k: k for k in read.loaded}
    return result, Report(
        loaded=tuple(k for k in result if k not in resized and k not in copied),
        resized=resized,
        copied=copied,
        initialised=tuple(k for k in expected if k not in result),
        remarks=('images are read by a frozen copy of it',) if copied else (),
    )


def _strip(
    state_dict: StateDict, expected: StateDict, path: str
) -> tuple[StateDict, tuple[str, ...]]:
    """Without the prefix of a run, and by timm's names; and what else there is in the run."""
    for prefix in _PREFIXES:
        state = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        if is_of_mmseg(state):
            state = from_mmseg(state)
        if any(name in expected and not name.startswith(HEADS) for name in state):
            return state, tuple(k for k in state_dict if not k.startswith(prefix))
    raise ValueError(
        f'checkpoint {path!r} has no key of the model: it has {shorten(state_dict)}; '
        f'the model has {shorten(expected)}'
    )


def _rename_norm(state: StateDict, expected: StateDict) -> tuple[StateDict, list[str]]:
    """A classifier that averages its features normalises them afterwards, others before."""
    for theirs, ours in (('fc_norm', 'norm'), ('norm', 'fc_norm')):
        name, other = f'{ours}.weight', f'{theirs}.weight'
        if name in expected and name not in state and other in state:
            renamed = {re.sub(rf'^{theirs}\.', f'{ours}.', k): v for k, v in state.items()}
            return renamed, [f'{theirs} becomes {ours}']
    return state, []


def _fit_head(
    state: StateDict, expected: StateDict, pooling: str
) -> tuple[StateDict, StateDict, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Both without heads unless they agree, what is left out, and notes if it is a classifier."""
    head = {k: v for k, v in expected.items() if k.startswith(CLASSIFIERS)}
    if not head:
        dropped = tuple(k for k in state if k.startswith(HEADS) and k not in expected)
        return {k: v for k, v in state.items() if k not in dropped}, expected, dropped, (), ()
    theirs = {k: v for k, v in state.items() if k.startswith(CLASSIFIERS)}
    problem = misfit(head, theirs)
    if not problem and not pooling:
        return state, expected, (), ('the head is the one of the checkpoint',), ()
    state, expected = (
        {k: v for k, v in part.items() if not k.startswith(CLASSIFIERS)}
        for part in (state, expected)
    )
    otherwise = f"the checkpoint's has features that are pooled otherwise: {pooling} would fit"
    notes = (f'the head is a fresh one, {problem or otherwise}',)
    # of as many classes, nobody has asked for a fresh one
    return state, expected, tuple(theirs), notes, () if problem else notes


def _in_names_of(model: Transformer, state: StateDict) -> StateDict:
    """By timm's names for a class of models, in the sizes of the model as far as timm can do that.

    Files of DINOv3 and DeiT III call LayerScale otherwise.
    """
    if isinstance(model, Eva):
        return eva.checkpoint_filter_fn(state, model)
    return vision_transformer.checkpoint_filter_fn(state, model, adapt_layer_scale=True)


def _resized_positions(
    state: StateDict, model: Transformer, path: str, image_sizes: Sequence[Size]
) -> StateDict:
    """The position embedding for the model's grid, if an image size fits it.

    Where none does, timm guesses the default size of the model, or else a square.
    """
    if not {'pos_embed', _STEM} <= state.keys():
        return {}
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    leading, positions = state['pos_embed'].tensor_split([prefix], dim=1)
    patch = state[_STEM].shape[-2:]
    for height, width in image_sizes:
        grid = (height // patch[0], width // patch[1])
        if math.prod(grid) == positions.shape[1]:
            new_size = list(model.patch_embed.grid_size)
            resized = resample_abs_pos_embed_nhwc(positions.unflatten(1, grid), new_size)
            return {'pos_embed': torch.cat([leading, resized.flatten(1, 2)], dim=1)}
    count = positions.shape[1]
    # timm would reshape any number somehow; DINOv2's files have a prefix that it takes off first
    if math.isqrt(count) ** 2 != count and 'mask_token' not in state:
        raise ValueError(
            f'checkpoint {path!r} does not fit the model: pos_embed is '
            f'{tuple(state["pos_embed"].shape)}, and of which img_size the file does not say, if '
            f'no_embed_class={model.no_embed_class} is right'
        )
    return {}


def _fitted_stem(state: StateDict, expected: StateDict) -> StateDict:
    """The patch embedding for images of other channels than three, as timm makes it."""
    if _STEM not in state or _STEM not in expected:
        return {}
    channels = expected[_STEM].shape[1]
    if channels == 3 or state[_STEM].shape[1] != 3:
        return {}
    return {_STEM: adapt_input_conv(channels, state[_STEM])}


def _fit_layers(state: StateDict, model: Transformer) -> StateDict:
    """What each MoE layer makes of its part, if that has experts like its own."""
    for name, layer in moe_layers(model).items():
        prefix = f'{name}.'
        part = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        experts = {k: v for k, v in layer.state_dict().items() if k.startswith('experts.')}
        if all(k in part and part[k].shape == v.shape for k, v in experts.items()):
            fitted = {prefix + k: v for k, v in layer.fit_state(part).items()}
            others = {k: v for k, v in state.items() if not k.startswith(prefix)}
            state = others | fitted
    return state


def _upcycled(
    model: Transformer, state: StateDict, path: str, how: Upcycling
) -> tuple[StateDict, dict[str, str]]:
    """Experts made of the dense MLPs in their place, and which tensor each was made of."""
    made: StateDict = {}
    sources: dict[str, str] = {}
    for name, layer in moe_layers(model).items():
        prefix = f'{name}.'
        part = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        if part and not any(key.startswith('experts.') for key in part):
            experts = upcycle(part, layer.experts, how, f'{name} of checkpoint {path!r}')
            made |= {f'{prefix}experts.{key}': value for key, value in experts.items()}
            sources |= {f'{prefix}experts.{key}': prefix + key for key in experts}
    allowed = f'its defaults, checkpoint {path!r} has no dense MLP to make experts of'
    check(bool(made) or how == Upcycling(), 'upcycling', how, allowed)
    return made, sources
