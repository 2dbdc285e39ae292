"""Weights from elsewhere for a vision transformer: fitted, and nothing lost in silence.

Everything here works on state dicts; `engine/checkpoint.py` reads the files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from ..moe import moe_layers

StateDict = dict[str, Tensor]
Size = tuple[int, int]
# Where the keys of a vision transformer begin: in a segmentation run, in a classification run (or
# in a backbone alone), in a run of mmseg's own backbone, in timm.
_PREFIXES = ('backbone.model.', 'model.', 'backbone.', '')
_CLASSIFIERS = ('head.', 'head_dist.')
_HEADS = (*_CLASSIFIERS, 'attn_pool.')
# mmseg's `VisionTransformer` has other names for the same parts.
_FROM_MMSEG = (
    (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
    (r'^layers\.', 'blocks.'),
    (r'^ln1\.', 'norm.'),
    (r'\.ln([12])\.', r'.norm\1.'),
    (r'\.attn\.attn\.in_proj_', '.attn.qkv.'),
    (r'\.attn\.attn\.out_proj\.', '.attn.proj.'),
    (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
    (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
)


def fit_state(
    model: VisionTransformer, state_dict: StateDict, path: str, image_sizes: Sequence[Size] = ()
) -> tuple[StateDict, list[str]]:
    """The part of a checkpoint that belongs into a model, resized where that can be done.

    A classifier takes the checkpoint's head if it has the same classes by number, and keeps the one
    that it was initialised with otherwise.

    Args:
        model: Position and patch embeddings are resized to its sizes; its MoE layers fit theirs.
        state_dict: Of a segmentation or classification run, of timm, or of mmseg.
        path: Where it came from, for messages.
        image_sizes: Of which one may be the size of the images that its positions belong to.

    Returns:
        State dict to load, and lines for the log: what was loaded, resized, missing or unused.

    Raises:
        ValueError: Nothing matches, or the checkpoint is of another size or method.
    """
    expected = model.state_dict()
    state, notes = _rename_norm(_strip(state_dict, expected, path), expected)
    state, expected, head = _fit_head(state, expected)
    _refuse_other_tokens(state, expected, path)
    positions = _resized_positions(state, model, path, image_sizes)
    filtered = checkpoint_filter_fn({**state, **positions}, model)
    filtered |= positions  # timm takes them for those of the model's default size and resizes again
    fitted = _fit_layers(filtered, model)
    _refuse_misfits(expected, filtered, fitted, path)
    notes += [
        f'{name} resized from {tuple(state[name].shape)} to {tuple(value.shape)}'
        for name, value in fitted.items()
        if name in state and state[name].shape != value.shape
    ]
    notes += [*head, *_describe(expected, filtered, fitted)]
    result = {name: value for name, value in fitted.items() if name in expected}
    return result, [f'{path}: {note}' for note in notes]


def _strip(state_dict: StateDict, expected: StateDict, path: str) -> StateDict:
    """Without the prefix of a run, and by timm's names."""
    for prefix in _PREFIXES:
        state = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        if any(name.startswith('layers.0.') for name in state):
            state = _from_mmseg(state)
        if any(name in expected and not name.startswith(_HEADS) for name in state):
            return state
    raise ValueError(
        f'checkpoint {path!r} has no key of the model: it has {shorten(list(state_dict))}; '
        f'the model has {shorten(list(expected))}'
    )


def _from_mmseg(state: StateDict) -> StateDict:
    renamed = {}
    for name, value in state.items():
        for theirs, timms in _FROM_MMSEG:
            name = re.sub(theirs, timms, name)
        renamed[name] = value
    if 'patch_embed.proj.weight' in renamed:  # mmseg's has no bias unless asked for
        zero = torch.zeros(len(renamed['patch_embed.proj.weight']))
        renamed.setdefault('patch_embed.proj.bias', zero)
    return renamed


def _rename_norm(state: StateDict, expected: StateDict) -> tuple[StateDict, list[str]]:
    """A classifier that averages its features normalises them afterwards, others before."""
    for theirs, ours in (('fc_norm', 'norm'), ('norm', 'fc_norm')):
        name, other = f'{ours}.weight', f'{theirs}.weight'
        if name in expected and name not in state and other in state:
            renamed = {re.sub(rf'^{theirs}\.', f'{ours}.', k): v for k, v in state.items()}
            return renamed, [f'{theirs} becomes {ours}']
    return state, []


def _fit_head(
    state: StateDict, expected: StateDict
) -> tuple[StateDict, StateDict, tuple[str, ...]]:
    """Both without heads unless they agree, and a note if the model is a classifier."""
    head = {k: v for k, v in expected.items() if k.startswith(_CLASSIFIERS)}
    if not head:
        dropped = {k for k in state if k.startswith(_HEADS) and k not in expected}
        return {k: v for k, v in state.items() if k not in dropped}, expected, ()
    problem = misfit(head, {k: v for k, v in state.items() if k.startswith(_CLASSIFIERS)})
    if not problem:
        return state, expected, ('the head is the one of the checkpoint',)
    state, expected = (
        {k: v for k, v in part.items() if not k.startswith(_CLASSIFIERS)}
        for part in (state, expected)
    )
    return state, expected, (f'the head is a fresh one, {problem}',)


def _refuse_other_tokens(state: StateDict, expected: StateDict, path: str) -> None:
    for name in ('cls_token', 'pos_embed'):
        if (name in state) != (name in expected):
            holder = 'the checkpoint' if name in state else 'the model'
            raise ValueError(
                f'checkpoint {path!r} does not fit the model: only {holder} has {name}'
            )


def _resized_positions(
    state: StateDict, model: VisionTransformer, path: str, image_sizes: Sequence[Size]
) -> StateDict:
    """The position embedding for the model's grid, if an image size fits it.

    Where none does, timm guesses the default size of the model, or else a square.
    """
    if not {'pos_embed', 'patch_embed.proj.weight'} <= state.keys():
        return {}
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    leading, positions = state['pos_embed'].tensor_split([prefix], dim=1)
    patch = state['patch_embed.proj.weight'].shape[-2:]
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
            f'{tuple(state["pos_embed"].shape)}, and of which img_size the file does not say'
        )
    return {}


def _fit_layers(state: StateDict, model: VisionTransformer) -> StateDict:
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


def _refuse_misfits(expected: StateDict, filtered: StateDict, fitted: StateDict, path: str) -> None:
    shapes = _other_shapes(expected, fitted)
    if shapes:
        raise ValueError(f'checkpoint {path!r} is of another size: {shorten(shapes)}')
    # Experts where the model has others: weights of a dense model may start one with experts, but
    # those of one method mean nothing to another.
    routed = {_layer(name) for name in filtered if '.mlp.experts.' in name}
    routed &= {_layer(name) for name in expected}
    missing_keys = [k for k in expected if _layer(k) in routed and k not in fitted]
    unexpected_keys = [k for k in filtered if _layer(k) in routed and k not in expected]
    if missing_keys or any(k in fitted for k in unexpected_keys):
        raise ValueError(
            f'checkpoint {path!r} is of another MoE method: only it has '
            f'{shorten(unexpected_keys) or "nothing"}; only the model has '
            f'{shorten(missing_keys) or "nothing"}'
        )


def _layer(name: str) -> str:
    """'blocks.1.mlp' of 'blocks.1.mlp.router.weight', and nothing of what is not in an MLP."""
    layer, found, _ = name.partition('.mlp.')
    return f'{layer}.mlp' if found else ''


def _describe(expected: StateDict, filtered: StateDict, fitted: StateDict) -> list[str]:
    missing_keys = [name for name in expected if name not in fitted]
    unexpected_keys = [name for name in filtered if name not in expected]
    whole = 'model' if any(name.startswith(_CLASSIFIERS) for name in expected) else 'backbone'
    loaded = len(expected) - len(missing_keys)
    notes = [f'loaded {loaded} of the {len(expected)} tensors of the {whole}']
    if missing_keys:
        notes.append(f'not in the checkpoint, as initialised: {", ".join(missing_keys)}')
    if unexpected_keys:
        notes.append(f'not in the model, unused: {", ".join(unexpected_keys)}')
    return notes


def misfit(expected: StateDict, state_dict: StateDict) -> str:
    """What keeps a state dict from being loaded, in words; empty if nothing does.

    Args:
        expected: State dict of the model.
        state_dict: Of the checkpoint; a leading `module.` in its keys is ignored.
    """
    state = {name.removeprefix('module.'): value for name, value in state_dict.items()}
    parts = {
        'missing keys': [name for name in expected if name not in state],
        'unexpected keys': [name for name in state if name not in expected],
        'shapes': _other_shapes(expected, state),
    }
    return '; '.join(f'{what}: {shorten(names)}' for what, names in parts.items() if names)


def _other_shapes(expected: StateDict, state: StateDict) -> list[str]:
    return [
        f'{name} is {tuple(state[name].shape)}, the model has {tuple(value.shape)}'
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]


def shorten(names: list[str], limit: int = 3) -> str:
    """The first names, and how many more there are.

    Args:
        names: What to list.
        limit: How many to write out.
    """
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more
