"""A trained model from its config and a checkpoint, without a runner."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import load_state_dict

from vqmoe_vision.models.create import without_weights
from vqmoe_vision.models.normalization import KEY

from .checkpoint import read_state
from .normalization import read_normalization
from .stated_experts import check_experts

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
    _check_device(device)
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


def _check_device(device: str | None) -> None:
    """Finds out before the weights are read."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # torch without CUDA, a GPU that is not there
        reason = str(error).partition('\n')[0]
        raise ValueError(f'device={device!r} is not possible: {reason}') from error
