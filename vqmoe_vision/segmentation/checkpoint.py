"""Weights from elsewhere for a backbone: read as data, fitted, and nothing lost in silence."""

import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

import vqmoe_vision.engine.checkpoint  # noqa: F401  or the log in a checkpoint is refused
from vqmoe_vision.engine.hooks import shorten

State = dict[str, Tensor]
Size = tuple[int, int]
# Where the keys of a vision transformer begin: in a segmentation run, in a classification run (or
# in a backbone alone), in a run of mmseg's own backbone, in timm.
_PREFIXES = ('backbone.model.', 'model.', 'backbone.', '')
_HEADS = ('head.', 'head_dist.', 'attn_pool.')
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


def read_state(path: str) -> State:
    """Reads the weights of a file without running any code that it may hold.

    Args:
        path: A .pth file of mmengine or timm, or a .safetensors file.

    Raises:
        ValueError: The file is missing, damaged, or holds more than weights.
    """
    if not Path(path).is_file():
        raise ValueError(f'checkpoint {path!r} does not exist')
    try:
        return load_state_dict(path, weights_only=True)
    except Exception as error:  # bytes of another format can make an unpickler fail in any way
        raise ValueError(
            f'checkpoint {path!r} is damaged, or holds more than weights and is not loaded'
        ) from error


def read_image_sizes(path: str) -> list[Size]:
    """Values of `img_size` in the config that mmengine saves beside the weights of a run.

    Args:
        path: As `read_state`, which has read it already.

    Returns:
        (height, width) each; empty for a file of others.
    """
    if path.endswith('.safetensors'):
        return []
    content = torch.load(path, 'cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    config = str(content.get('meta', {}).get('cfg', ''))
    found = re.findall(r'\bimg_size=(?:[(\[]\s*(\d+),\s*(\d+),?\s*[)\]]|(\d+))', config)
    return [(int(height or side), int(width or side)) for height, width, side in found]


def fit_state(
    model: VisionTransformer, loaded: State, path: str, image_sizes: Sequence[Size] = ()
) -> tuple[State, list[str]]:
    """The part of a checkpoint that belongs into a backbone, resized where that can be done.

    Args:
        model: The backbone's model; position and patch embeddings, and SoftMoE's slots, are resized
            to its sizes.
        loaded: State dict of a segmentation or classification run, of timm, or of mmseg.
        path: Where it came from, for messages.
        image_sizes: Of which one may be the size of the images that its positions belong to.

    Returns:
        State dict to load, and lines for the log: what was loaded, resized, missing or unused.

    Raises:
        ValueError: Nothing matches, or the checkpoint is of another size or method.
    """
    own = model.state_dict()
    state = _strip(loaded, own, path)
    notes = []
    if 'norm.weight' in own and 'norm.weight' not in state and 'fc_norm.weight' in state:
        # a classifier that averages its features normalises them afterwards
        for name in ('weight', 'bias'):
            state[f'norm.{name}'] = state.pop(f'fc_norm.{name}')
        notes.append(f'{path}: fc_norm becomes norm')
    for name in ('cls_token', 'pos_embed'):
        if (name in state) != (name in own):
            holder = 'the checkpoint' if name in state else 'the model'
            raise ValueError(
                f'checkpoint {path!r} does not fit the model: only {holder} has {name}'
            )
    positions = _resized_positions(state, model, path, image_sizes)
    fitted = checkpoint_filter_fn({**state, **positions}, model)
    fitted |= positions  # timm takes them for those of the model's default size and resizes again
    fitted |= _resized_slots(fitted, own)
    resized = [name for name in fitted if name in state and fitted[name] is not state[name]]
    notes += [
        f'{path}: {name} resized from {tuple(state[name].shape)} to {tuple(fitted[name].shape)}'
        for name in resized
        if state[name].shape != fitted[name].shape
    ]
    _refuse_misfits(own, fitted, path)
    return _partition(own, fitted, path, notes)


def _strip(loaded: State, own: State, path: str) -> State:
    """Without the prefix of a run, heads left out."""
    for prefix in _PREFIXES:
        state = {k[len(prefix) :]: v for k, v in loaded.items() if k.startswith(prefix)}
        if any(name.startswith('layers.0.') for name in state):
            state = _from_mmseg(state)
        state = {k: v for k, v in state.items() if not k.startswith(_HEADS)}
        if state.keys() & own.keys():
            return state
    raise ValueError(
        f'checkpoint {path!r} has no key of the model: it has {shorten(list(loaded))}; '
        f'the model has {shorten(list(own))}'
    )


def _from_mmseg(state: State) -> State:
    renamed = {}
    for name, value in state.items():
        for theirs, timms in _FROM_MMSEG:
            name = re.sub(theirs, timms, name)
        renamed[name] = value
    if 'patch_embed.proj.weight' in renamed:  # mmseg's has no bias unless asked for
        zero = torch.zeros(len(renamed['patch_embed.proj.weight']))
        renamed.setdefault('patch_embed.proj.bias', zero)
    return renamed


def _resized_positions(
    state: State, model: VisionTransformer, path: str, image_sizes: Sequence[Size]
) -> State:
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


def _resized_slots(state: State, own: State) -> State:
    """Slots of SoftMoE layers that have another number of them per expert.

    Copies share the weight that their original had, so that as many copies of each leave the
    layer's answer as it is. They differ by a hundredth: equal ones would stay equal for ever.
    """
    resized = {}
    for name, slots in state.items():
        layer, found, _ = name.partition('.slot_embed')
        if not found or name not in own or own[name].shape == slots.shape:
            continue
        by_expert = slots.unflatten(0, (len(state[f'{layer}.experts.fc1.weight']), -1))
        before, after = by_expert.shape[1], len(own[name]) // len(by_expert)
        chosen = by_expert[:, torch.arange(after) * before // max(after, 1)]
        if after > before:
            spread = 0.01 * chosen.norm(dim=-1, keepdim=True) / math.sqrt(chosen.shape[-1])
            chosen = chosen + spread * torch.randn_like(chosen)
        resized[name] = chosen.flatten(0, 1)
    return resized


def _refuse_misfits(own: State, fitted: State, path: str) -> None:
    shapes = [
        f'{name} is {tuple(fitted[name].shape)}, the model has {tuple(value.shape)}'
        for name, value in own.items()
        if name in fitted and fitted[name].shape != value.shape
    ]
    if shapes:
        raise ValueError(f'checkpoint {path!r} is of another size: {shorten(shapes)}')
    # Experts where the model has others: weights of a dense model may start one with experts, but
    # those of one method mean nothing to another.
    routed = {_layer(name) for name in fitted if '.mlp.experts.' in name}
    strange = [name for name in fitted if _layer(name) in routed and name not in own]
    missing = [name for name in own if _layer(name) in routed and name not in fitted]
    kept = {_layer(name) for name in own}
    # VQMoE's discrete form is the full form without router and gate
    discrete = {_layer(name) for name in own if '.mlp.quantizer.' in name}
    extra = tuple(f'{layer}.{part}.' for layer in discrete for part in ('router', 'gate'))
    strange = [name for name in strange if _layer(name) in kept]
    if missing or not all(name.startswith(extra) for name in strange):
        raise ValueError(
            f'checkpoint {path!r} is of another MoE method: only it has '
            f'{shorten(strange) or "nothing"}; only the model has {shorten(missing) or "nothing"}'
        )


def _layer(name: str) -> str:
    """'blocks.1.mlp' of 'blocks.1.mlp.router.weight', and nothing of what is not in an MLP."""
    layer, found, _ = name.partition('.mlp.')
    return f'{layer}.mlp' if found else ''


def _partition(own: State, fitted: State, path: str, notes: list[str]) -> tuple[State, list[str]]:
    state = {name: value for name, value in fitted.items() if name in own}
    notes.append(f'{path}: loaded {len(state)} of the {len(own)} tensors of the backbone')
    missing = [name for name in own if name not in state]
    unused = [name for name in fitted if name not in own]
    if missing:
        notes.append(f'{path}: not in the checkpoint, as initialised: {", ".join(missing)}')
    if unused:
        notes.append(f'{path}: not in the model, unused: {", ".join(unused)}')
    return state, notes
