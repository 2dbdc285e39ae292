"""Weights from elsewhere for a backbone: read as data, fitted, and nothing lost in silence."""

from pathlib import Path

from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

import vqmoe_vision.engine.checkpoint  # noqa: F401  or the log in a checkpoint is refused
from vqmoe_vision.engine.hooks import shorten

State = dict[str, Tensor]
# Where the keys of a vision transformer begin: in a segmentation run, in a classification run (or
# in a backbone alone), in timm.
_PREFIXES = ('backbone.model.', 'model.', '')
_HEADS = ('head.', 'head_dist.', 'attn_pool.')


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


def fit_state(model: VisionTransformer, loaded: State, path: str) -> tuple[State, list[str]]:
    """The part of a checkpoint that belongs into a backbone, resized where that can be done.

    Args:
        model: The backbone's model; position and patch embeddings are resized to its sizes.
        loaded: State dict of a segmentation or classification run, or of timm.
        path: Where it came from, for messages.

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
    fitted = checkpoint_filter_fn(state, model)
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
        state = {k: v for k, v in state.items() if not k.startswith(_HEADS)}
        if state.keys() & own.keys():
            return state
    raise ValueError(
        f'checkpoint {path!r} has no key of the model: it has {shorten(list(loaded))}; '
        f'the model has {shorten(list(own))}'
    )


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
    strange = [name for name in strange if _layer(name) in kept]
    if strange or missing:
        raise ValueError(
            f'checkpoint {path!r} is of another MoE method: it has {shorten(strange) or "nothing"} '
            f'instead of {shorten(missing) or "nothing"}'
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
