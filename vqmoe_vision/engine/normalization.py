"""Normalisation follows the weights: what a training that starts from them has to feed.

A model keeps what it is fed with as a buffer, so that its checkpoints say it to whoever loads them.
"""

from collections.abc import Iterable
from typing import Any

from mmengine.logging import print_log
from torch import nn

from vqmoe_vision.models.described import describe
from vqmoe_vision.models.normalization import (
    KEY,
    Normalization,
    of_buffer,
    stated_normalization,
)
from vqmoe_vision.models.sources import file_of, source_of

from .checkpoint import read_content


def weights_normalization(
    model: nn.Module, checkpoint: str | None, arguments: dict[str, Any]
) -> Normalization | None:
    """How images were normalised for the weights that a training starts from; logs it.

    What `pretrained_cfg_overlay` states is before all that weights say of themselves; it stands for
    those of `load_from` too, which come later and may say nothing.

    Args:
        model: Built by timm.
        checkpoint: File that it has been started from, as `start_from`.
        arguments: Of timm's `create_model`: `checkpoint_path`, `pretrained`, `upcycle`,
            `pretrained_cfg` and `pretrained_cfg_overlay` say which weights it had before.

    Returns:
        None if nobody says how.

    Raises:
        ValueError: As `stated_normalization`, of the overlay.
    """
    checkpoint = checkpoint or arguments.get('checkpoint_path')
    upcycle = arguments.get('upcycle')
    overlay = arguments.get('pretrained_cfg_overlay') or {}
    found = stated_normalization(overlay, 'pretrained_cfg_overlay.')
    if not has_weights(checkpoint, arguments):
        if found is not None:
            told = f'pretrained_cfg_overlay: images are normalised with {in_words(found)}'
            print_log(told, logger='current')
        return found
    if found is None:
        found = read_normalization(checkpoint) if checkpoint else _of_timms(model, arguments)
    source = checkpoint or upcycle or source_of(_pretrained_cfg(model))
    if found is None:
        said = 'how images were normalised for it is not known, they are as the config says'
    else:
        said = f'images were normalised for it with {in_words(found)}'
    print_log(f'{source}: {said}', logger='current')
    return found


def has_weights(checkpoint: str | None, arguments: dict[str, Any]) -> bool:
    """Whether a training starts from weights.

    Args:
        checkpoint: As `weights_normalization`.
        arguments: As `weights_normalization`.
    """
    given = ('upcycle', 'pretrained', 'checkpoint_path')
    return bool(checkpoint is not None or any(arguments.get(name) for name in given))


def _pretrained_cfg(model: Any) -> dict[str, Any]:
    config: dict[str, Any] = model.pretrained_cfg
    return config


def _of_timms(model: nn.Module, arguments: dict[str, Any]) -> Normalization | None:
    """Of weights that timm has loaded, whose configuration it keeps beside the model.

    The overlay says nothing of it.
    """
    config, upcycle = _pretrained_cfg(model), arguments.get('upcycle')
    given = arguments.get('pretrained_cfg')
    # what it leaves out timm fills with the numbers of ImageNet, of any weights
    described = given if isinstance(given, dict) and not upcycle else {}
    overlay = arguments.get('pretrained_cfg_overlay') or {}
    numbers = {'mean', 'std'} <= described.keys()
    file = file_of(upcycle) or {**described, **overlay}.get('file')
    if file and not numbers and (found := read_normalization(str(file))):
        return found
    # a model of this package without weights of its own has a configuration if others brought one
    brought = bool(upcycle) and not file_of(upcycle)
    own = not (upcycle or described) and config.get('tag') != 'untrained'
    return Normalization.of(config) if brought or numbers or own else None


def read_normalization(path: str) -> Normalization | None:
    """How images were normalised in the run that has left a file, or its folder for timm.

    Args:
        path: File or folder of timm, whose checksums somebody has compared.

    Returns:
        None if it is no file of a run of this package.

    Raises:
        ValueError: The file is missing, damaged, or holds more than weights and a log.
    """
    config = describe(path).config
    if {'mean', 'std'} <= config.keys():
        return Normalization.of(config)
    content = None if path.endswith('.safetensors') else read_content(path, verify=False)
    state = content.get('state_dict') if isinstance(content, dict) else None
    return of_buffer(state.get(KEY)) if isinstance(state, dict) else None


def must_change(
    found: Normalization,
    weights: Normalization,
    stated: Iterable[str],
    field: str,
    white: float = 1.0,
    owner: str = 'the weights',
) -> bool:
    """Whether images have to be normalised otherwise than they are.

    Args:
        found: How they are.
        weights: How they were for the weights.
        stated: Which of 'mean' and 'std' the config states, and are not to be changed.
        field: Of the config that holds both.
        white: What a white pixel is there.
        owner: Whose images were normalised so; without weights it is another field of the config.

    Raises:
        ValueError: What the config states contradicts the weights.
    """
    differing = found.differing(weights)
    for name in differing:
        if name in stated:
            value = _listed(getattr(found, name), white)
            raise ValueError(
                f'{field}.{name}={value} contradicts {owner}, whose images had '
                f'{name}={_listed(getattr(weights, name), white)}: write --cfg-options '
                f'{field}.mean={_listed(weights.mean, white)} '
                f'{field}.std={_listed(weights.std, white)}'
            )
    if differing:
        print_log(f'{field}: {in_words(weights, white)}, as {owner} had them', logger='current')
    return bool(differing)


def in_words(normalization: Normalization, white: float = 1.0) -> str:
    """Mean and standard deviation for a message.

    Args:
        normalization: Of pixels in [0, 1].
        white: What a white pixel is instead.
    """
    mean, std = (_listed(values, white) for values in (normalization.mean, normalization.std))
    return f'mean {mean} and std {std}'


def _listed(values: tuple[float, ...], white: float) -> str:
    """As `--cfg-options` takes a list."""
    return f'[{",".join(f"{value * white:.6g}" for value in values)}]'
