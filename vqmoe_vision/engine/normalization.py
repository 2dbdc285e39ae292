"""Normalisation follows the weights: what a training that starts from them has to feed.

A model keeps what it is fed with as a buffer, so that its checkpoints say it to whoever loads them.
"""

import logging
from collections.abc import Iterable
from typing import Any

from mmengine.logging import print_log
from timm.data import resolve_model_data_config
from torch import nn

from vqmoe_vision.models.normalization import (
    KEY,
    Normalization,
    of_buffer,
    stated_normalization,
)
from vqmoe_vision.models.weights import describe, source_of

from .checkpoint import read_content


def weights_normalization(
    model: nn.Module, checkpoint: str | None, arguments: dict[str, Any]
) -> Normalization | None:
    """How images were normalised for the weights that a training starts from; logs it."""
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
    """Whether a training starts from weights."""
    given = ('upcycle', 'pretrained', 'checkpoint_path')
    return bool(checkpoint is not None or any(arguments.get(name) for name in given))


def _pretrained_cfg(model: Any) -> dict[str, Any]:
    config: dict[str, Any] = model.pretrained_cfg
    return config


def _of_timms(model: Any, arguments: dict[str, Any]) -> Normalization | None:
    """Of weights that timm has loaded, whose configuration it keeps beside the model."""
    given, upcycle = arguments.get('pretrained_cfg'), arguments.get('upcycle')
    stated = given if isinstance(given, dict) and not upcycle else {}
    # what it leaves out timm fills with the numbers of ImageNet, of any weights
    if {'mean', 'std'} <= stated.keys():
        return Normalization.of(stated)
    report = getattr(model, 'weights_report', None)
    if report is not None and report.normalization is not None:
        found: Normalization = report.normalization
        return found
    # a model of this package without weights of its own has no configuration of any
    own = not (upcycle or stated) and model.pretrained_cfg.get('tag') != 'untrained'
    config = resolve_model_data_config(model)
    return Normalization.of(config) if own else None


def read_normalization(path: str) -> Normalization | None:
    """How images were normalised in the run that has left a file, or its folder for timm."""
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
    """Whether images have to be normalised otherwise than they are; what a config states stays."""
    differing = found.differing(weights)
    if set(stated) & set(differing):
        told = (
            f'{field} states {in_words(found, white)}, which count, and contradict {owner}, '
            f'whose images had {in_words(weights, white)}'
        )
        print_log(told, 'current', logging.WARNING)
        return False
    if differing:
        print_log(f'{field}: {in_words(weights, white)}, as {owner} had them', logger='current')
    return bool(differing)


def in_words(normalization: Normalization, white: float = 1.0) -> str:
    """Mean and standard deviation for a message."""
    mean, std = (_listed(values, white) for values in (normalization.mean, normalization.std))
    return f'mean {mean} and std {std}'


def _listed(values: tuple[float, ...], white: float) -> str:
    return f'[{",".join(f"{value * white:.6g}" for value in values)}]'
