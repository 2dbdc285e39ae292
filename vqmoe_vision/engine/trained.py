"""A model with weights: at the start of a training, and after one, without a runner.

Normalisation follows the weights: a model keeps what it is fed with as a buffer, so that its
checkpoints say it to whoever loads them.
"""

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import load_state_dict
from timm.data import resolve_model_data_config
from torch import nn

from vqmoe_vision.models.compat import compare, network_of_run
from vqmoe_vision.models.create import share_start, without_weights
from vqmoe_vision.models.layers import Transformer
from vqmoe_vision.models.normalization import (
    KEY,
    Normalization,
    of_buffer,
    stated_normalization,
)
from vqmoe_vision.models.weights import check_one_source, describe, network_of, source_of
from vqmoe_vision.moe import restart
from vqmoe_vision.moe.config import check
from vqmoe_vision.moe.raw_patches import image_reader

from .checkpoint import log_weights, read_content, read_state, start_from


def weights_normalization(
    model: Any, checkpoint: str | None, arguments: dict[str, Any]
) -> Normalization | None:
    """How images were normalised for the weights that a training starts from; logs it."""
    checkpoint = checkpoint or arguments.get('checkpoint_path')
    source, overlay = 'pretrained_cfg_overlay', arguments.get('pretrained_cfg_overlay') or {}
    found = stated_normalization(overlay, f'{source}.')
    if has_weights(checkpoint, arguments):
        source = checkpoint or arguments.get('upcycle') or source_of(model.pretrained_cfg)
        if found is None:
            found = read_normalization(checkpoint) if checkpoint else _of_timms(model, arguments)
    elif found is None:
        return None
    known = f'images are normalised with {in_words(found)}' if found is not None else ''
    unknown = 'how images were normalised for it is not known, they are as the config says'
    print_log(f'{source}: {known or unknown}', logger='current')
    return found


def has_weights(checkpoint: str | None, arguments: dict[str, Any]) -> bool:
    """Whether a training starts from weights."""
    given = map(arguments.get, ('upcycle', 'pretrained', 'checkpoint_path'))
    return checkpoint is not None or any(given)


def _of_timms(model: Any, arguments: dict[str, Any]) -> Normalization | None:
    """Of weights that timm has loaded, whose configuration it keeps beside the model."""
    given, upcycle = arguments.get('pretrained_cfg'), arguments.get('upcycle')
    stated = given if isinstance(given, dict) and not upcycle else {}
    # what it leaves out timm fills with the numbers of ImageNet, of any weights
    if {'mean', 'std'} <= stated.keys():
        return Normalization.of(stated)
    if (report := getattr(model, 'weights_report', None)) is not None and report.normalization:
        return report.normalization
    # a model of this package without weights of its own has no configuration of any
    own = not (upcycle or stated) and model.pretrained_cfg.get('tag') != 'untrained'
    return Normalization.of(resolve_model_data_config(model)) if own else None


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
    mean, std = (
        ','.join(f'{value * white:.6g}' for value in values)
        for values in (normalization.mean, normalization.std)
    )
    return f'mean [{mean}] and std [{std}]'


# Of a model where the timm model may be: of a segmentation, and of what augments a test.
_PARTS = ('backbone', 'module')


def scope_of(config: Config) -> AbstractContextManager:
    """A block in which names of a config mean what they mean in its runs."""
    return DefaultScope.overwrite_default_scope(config.get('default_scope', 'mmengine'))


def without_sources(model: dict[str, Any]) -> ConfigDict:
    """The model of a config whose weights are those of its run."""
    inner = {n: without_sources(model[n]) for n in _PARTS if isinstance(model.get(n), dict)}
    changed = {**model, **inner}
    if isinstance(changed.get('model_name'), str):  # or what builds it says what is wrong
        changed = without_weights(changed)
        changed |= {'features': None} if changed.get('features') else {}
    return ConfigDict(changed)


def load_trained(config: Config, checkpoint: str, device: str | None = None) -> Any:
    """Builds the model of a config with the weights of a checkpoint, ready to predict."""
    with scope_of(config):
        model = MODELS.build(without_sources(config.model))
    state = read_state(checkpoint)
    if (known := read_normalization(checkpoint)) is not None:
        state.setdefault(KEY, known.values())  # a folder of timm has it beside its weights
    check_experts(model.routed_model, checkpoint)
    if problem := model.misfit(state):
        raise ValueError(f'checkpoint {checkpoint!r} does not fit the config: {problem}')
    load_state_dict(model, state, strict=True)
    return model.to(device or ('cuda' if torch.cuda.is_available() else 'cpu')).eval()


def start_model(
    model: nn.Module, arguments: dict[str, Any], checkpoint: str | None, features: str | None
) -> Normalization | None:
    """Starts a new training: as every row does at this seed, or from weights."""
    check_one_source({**arguments, 'checkpoint': checkpoint})
    share_start(model, seed=torch.initial_seed(), **arguments)
    log_weights(model, arguments)
    if checkpoint is not None:
        assert isinstance(model, Transformer)
        start_from(model, checkpoint)
    for note in restart(model):
        print_log(note, logger='current')
    weights = weights_normalization(model, checkpoint, arguments)
    if (reader := image_reader(model)) is not None:
        return reader.before_start(features, has_weights(checkpoint, arguments), weights)
    check(features is None, 'features', features, 'None, the model decides by no such features')
    return weights


def check_experts(model: nn.Module, path: str, content: Any = None) -> None:
    """Refuses weights of another method, and logs which options of the experts were others."""
    network = network_of(path) if content is None else describe(path).network(path)
    for line in compare(model, network or network_of_run(content), path):
        print_log(f'{path}: {line}', 'current', logging.WARNING)
