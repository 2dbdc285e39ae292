"""Parts of a checkpoint by the names and in the sizes that a vision transformer of ours has."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models import adapt_input_conv, eva, vision_transformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from ..moe import moe_layers
from .arguments import FAILURES
from .foreign_names import from_mmseg, is_of_mmseg
from .hosts import Transformer
from .state_dicts import (
    CLASSIFIERS,
    HEADS,
    NORMS,
    StateDict,
    is_square,
    misfit,
    part_of,
    shorten,
)
from .weight_files import is_out_of_memory, named_reason

Size = tuple[int, int]
# Where the keys of a vision transformer begin: in a segmentation run, in a classification run (or
# in a backbone alone), in a run of mmseg's own backbone, in rstrudel/segmenter, in timm.
_PREFIXES = ('backbone.model.', 'model.', 'backbone.', 'encoder.', '')
_STEM = 'patch_embed.proj.weight'


def strip_names(
    state_dict: StateDict, expected: StateDict, path: str
) -> tuple[StateDict, tuple[str, ...]]:
    """Without the prefix of a run, and by timm's names; and what else there is in the run."""
    if not state_dict:
        raise ValueError(f'checkpoint {path!r} is empty: it has no weights')
    for prefix in _PREFIXES:
        state = part_of(state_dict, prefix)
        if is_of_mmseg(state):
            state = from_mmseg(state)
        if any(name in expected and not name.startswith(HEADS) for name in state):
            return state, tuple(k for k in state_dict if not k.startswith(prefix))
    raise ValueError(
        f'checkpoint {path!r} has no key of the model: it has {shorten(state_dict)}; '
        f'the model has {shorten(expected)}'
    )


def rename_norm(state: StateDict, expected: StateDict) -> tuple[StateDict, list[str]]:
    """A classifier that averages its features normalises them afterwards, others before."""
    for theirs, ours in (('fc_norm', 'norm'), ('norm', 'fc_norm')):
        name, other = f'{ours}.weight', f'{theirs}.weight'
        if name in expected and name not in state and other in state:
            renamed = {re.sub(rf'^{theirs}\.', f'{ours}.', k): v for k, v in state.items()}
            return renamed, [f'{theirs} becomes {ours}']
    return state, []


def fit_head(
    state: StateDict, expected: StateDict, pooling: str
) -> tuple[StateDict, StateDict, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Both without heads unless they agree; what is dropped, remarks, and which are warnings."""
    head = {k: v for k, v in expected.items() if k.startswith(CLASSIFIERS)}
    if not head:
        dropped = tuple(k for k in state if k.startswith(HEADS) and k not in expected)
        return {k: v for k, v in state.items() if k not in dropped}, expected, dropped, (), ()
    between = [k for k in state if k.startswith('pre_logits.')]
    theirs = {k: v for k, v in state.items() if k.startswith(CLASSIFIERS)}
    problem = misfit(head, theirs)
    if not problem and not pooling and not between:
        return state, expected, (), ('the head is the one of the checkpoint',), ()
    dropped = (*theirs, *between)
    state = {k: v for k, v in state.items() if k not in dropped}
    expected = {k: v for k, v in expected.items() if k not in head}
    otherwise = pooling
    if between:
        otherwise = f"the checkpoint's stands behind {shorten(sorted(between))}, which timm has not"
    notes = (f'the head is a fresh one, {problem or otherwise}',)
    # of as many classes, nobody has asked for a fresh one
    return state, expected, dropped, notes, () if problem else notes


def pooled_otherwise(expected: StateDict, state: StateDict) -> bool:
    """Whether heads are fed otherwise, as far as names tell."""
    parts = ('attn_pool.latent', 'norm.weight', 'fc_norm.weight')
    return any((name in expected) != (name in state) for name in parts)


def without_norm(expected: StateDict, fitted: StateDict) -> tuple[str, ...]:
    """A warning of a last norm that a checkpoint lacks, as that of a backbone without one may."""
    missing = [name for name in expected if name.startswith(NORMS) and name not in fitted]
    told = f'the checkpoint has no {shorten(missing)}: the last norm is as initialised'
    return (told,) if missing else ()


def in_names_of(model: Transformer, state: StateDict, path: str) -> StateDict:
    """By timm's names, in the sizes of the model as far as timm's filter can do that."""
    try:
        if isinstance(model, Eva):
            return eva.checkpoint_filter_fn(state, model)
        return vision_transformer.checkpoint_filter_fn(state, model, adapt_layer_scale=True)
    except FAILURES as error:
        if is_out_of_memory(error):
            raise
        kind = Eva if isinstance(model, Eva) else VisionTransformer
        raise ValueError(
            f"checkpoint {path!r} does not fit the model: timm's filter for {kind.__name__} could "
            f'not read its weights: {named_reason(error)}'
        ) from error


def left_out(state: StateDict, filtered: StateDict) -> tuple[str, ...]:
    """What timm's filter drops, such as the mask token of DINOv2."""
    renamed = {value.data_ptr() for name, value in filtered.items() if name not in state}
    return tuple(
        name
        for name, value in state.items()
        if name not in filtered and value.data_ptr() not in renamed
    )


def resized_positions(
    state: StateDict, model: Transformer, path: str, image_sizes: Sequence[Size]
) -> StateDict:
    """The position embedding for the model's grid, if an image size fits it."""
    if not {'pos_embed', _STEM} <= state.keys():
        return {}
    if 'register_tokens' in state and not model.no_embed_class:
        # where timm adds the position of the class token to it, which leaves it none
        raise ValueError(
            f"checkpoint {path!r} has DINOv2's registers, which have no positions: "
            'no_embed_class=False is not possible'
        )
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    leading, positions = state['pos_embed'].tensor_split([prefix], dim=1)
    patch = state[_STEM].shape[-2:]
    for height, width in image_sizes:
        grid = (height // patch[0], width // patch[1])
        if math.prod(grid) == positions.shape[1]:
            new_size = list(model.patch_embed.grid_size)
            resized = resample_abs_pos_embed_nhwc(positions.unflatten(1, grid), new_size)
            return {'pos_embed': torch.cat([leading, resized.flatten(1, 2)], dim=1)}
    if positions.shape[1] == math.prod(model.patch_embed.grid_size):
        return {}  # as many as the model has, which is all that is known
    # timm would reshape any number somehow; DINOv2's files have a prefix that it takes off first
    if not is_square(positions.shape[1]) and 'mask_token' not in state:
        raise ValueError(
            f'checkpoint {path!r} does not fit the model: pos_embed is '
            f'{tuple(state["pos_embed"].shape)}, no square with '
            f'no_embed_class={model.no_embed_class}; of other images '
            'pretrained_cfg_overlay=dict(input_size=(3, HEIGHT, WIDTH)) says the size'
        )
    return {}


def fitted_stem(state: StateDict, expected: StateDict) -> StateDict:
    """The patch embedding for images of other channels than three, as timm makes it."""
    if _STEM not in state or _STEM not in expected:
        return {}
    channels = expected[_STEM].shape[1]
    if channels == 3 or state[_STEM].shape[1] != 3:
        return {}
    return {_STEM: adapt_input_conv(channels, state[_STEM])}


def fit_layers(state: StateDict, model: Transformer) -> StateDict:
    """What each MoE layer makes of its part, if that has experts like its own."""
    for name, layer in moe_layers(model).items():
        prefix = f'{name}.'
        part = part_of(state, prefix)
        experts = {k: v for k, v in layer.state_dict().items() if k.startswith('experts.')}
        if all(k in part and part[k].shape == v.shape for k, v in experts.items()):
            fitted = {prefix + k: v for k, v in layer.fit_state(part).items()}
            others = {k: v for k, v in state.items() if not k.startswith(prefix)}
            state = others | fitted
    return state
