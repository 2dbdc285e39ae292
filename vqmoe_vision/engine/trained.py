"""A model with weights: at the start of a training, and after one, without a runner."""

import logging
from contextlib import AbstractContextManager
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from vqmoe_vision.models.compat import compare, network_of_run
from vqmoe_vision.models.create import without_weights
from vqmoe_vision.models.hosts import Transformer
from vqmoe_vision.models.normalization import KEY, Normalization
from vqmoe_vision.models.shared_start import share_start
from vqmoe_vision.models.weights import check_one_source, describe, network_of
from vqmoe_vision.moe import restart
from vqmoe_vision.moe.config import check
from vqmoe_vision.moe.raw_patches import image_reader

from .checkpoint import log_weights, read_state, start_from
from .normalization import has_weights, read_normalization, weights_normalization

# Of a model where the timm model may be: of a segmentation, and of what augments a test.
_PARTS = ('backbone', 'module')


def scope_of(config: Config) -> AbstractContextManager:
    """A block in which names of a config mean what they mean in its runs."""
    return DefaultScope.overwrite_default_scope(config.get('default_scope', 'mmengine'))


def without_sources(model: dict[str, Any]) -> ConfigDict:
    """The model of a config whose weights are those of its run."""
    parts = {name: model.get(name) for name in _PARTS}
    inner = {name: without_sources(part) for name, part in parts.items() if isinstance(part, dict)}
    changed = {**model, **inner}
    if not isinstance(changed.get('model_name'), str):  # what builds it says what is wrong
        return ConfigDict(changed)
    changed = without_weights(changed)
    return ConfigDict({**changed, **({'features': None} if changed.get('features') else {})})


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
        started = has_weights(checkpoint, arguments)
        weights = reader.before_start(features, started, weights)
    else:
        allowed = 'None, the model decides by no features of images'
        check(features is None, 'features', features, allowed)
    return weights


def check_experts(model: nn.Module, path: str, content: Any = None) -> None:
    """Refuses weights of another method, and logs which options of the experts were others."""
    network = network_of(path) if content is None else describe(path).network(path)
    for line in compare(model, network or network_of_run(content), path):
        print_log(f'{path}: {line}', 'current', logging.WARNING)
