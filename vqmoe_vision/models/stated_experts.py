"""What a source says of its experts beside their tensors, and the model that takes them.

Methods of equal tensors, and options without tensors, are told apart by nothing else.
"""

from __future__ import annotations

import zipfile
from argparse import Namespace
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..moe.config import MoeConfig
from ..moe.methods import METHODS
from .hosts import method_of
from .run_files import logs_passed_over
from .sparse_model import SparseModel
from .weight_files import is_file_name

# In `meta` of a checkpoint: what this package says of its run, as plain values.
STATED = 'vqmoe_vision'


@dataclass(frozen=True)
class StatedExperts:
    """What is known of experts."""

    method: str
    config: MoeConfig | None = None


def experts_of(model: Any) -> StatedExperts | None:
    """What a model says of its own."""
    return StatedExperts(model.method, model.moe_config) if isinstance(model, SparseModel) else None


def state_experts(model: Any) -> dict[str, Any]:
    """What `experts_of_run` reads again: method and options; neither without experts."""
    own = experts_of(model)
    if own is None or own.config is None:
        return {'method': own and own.method, 'options': None}
    unused = own.config.unused()
    options = {name: value for name, value in asdict(own.config).items() if name not in unused}
    return {'method': own.method, 'options': options}


def stated_in(content: Any) -> dict[str, Any]:
    """What a checkpoint of this package says of its run; {} of others, which are asked nothing."""
    meta = content.get('meta') if isinstance(content, dict) else None
    stated = meta.get(STATED) if isinstance(meta, dict) else None
    return stated if isinstance(stated, dict) else {}


def experts_of_run(content: Any) -> StatedExperts | None:
    """What the checkpoint of a run says, or what timm's train.py leaves in its own."""
    stated = stated_in(content)
    if not stated:
        return _experts_of_script(content)
    return _stated(stated.get('method'), stated.get('options'))


def _experts_of_script(content: Any) -> StatedExperts | None:
    """As `experts_of_run`, of what timm's `CheckpointSaver` has written."""
    if not isinstance(content, dict):
        return None
    script = vars(content['args']) if isinstance(content.get('args'), Namespace) else {}
    options = script.get('model_kwargs')
    method = method_of(str(script.get('model', content.get('arch'))))
    if method is None and isinstance(options, dict):
        method = options.get('method')
    return _stated(method, options)


def _stated(method: Any, options: Any) -> StatedExperts | None:
    """Of a method and what it was built with, as far as a file says them."""
    if not isinstance(method, str) or method not in METHODS:
        return None
    kind = METHODS[method].config
    if not isinstance(options, dict):
        return StatedExperts(method)
    try:
        own = {k: v for k, v in options.items() if k in kind.option_names()}
        return StatedExperts(method, kind.from_options(**own))
    except (TypeError, ValueError):  # of another version of this package
        return StatedExperts(method)


def experts_of_file(path: str) -> StatedExperts | None:
    """As `experts_of_run`, of a file that has been read before."""
    of_torch = is_file_name(path) and not path.endswith('.safetensors')
    if not of_torch or not Path(path).is_file():
        return None
    with logs_passed_over():
        content = torch.load(path, 'cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    return experts_of_run(content)


def compare_experts(model: nn.Module, stated: StatedExperts | None, path: str) -> tuple[str, ...]:
    """Refuse experts of another method, and say which options were others."""
    own = experts_of(model)
    if own is None or stated is None:
        return ()
    if own.method != stated.method:
        raise ValueError(
            f'checkpoint {path!r} does not fit the model: saved with method={stated.method!r}, '
            f'the model has {own.method!r}'
        )
    if own.config is None or stated.config is None:
        return ()
    names = stated.config.of_weights() & own.config.of_weights()
    return tuple(
        f'the experts were trained with {name}={theirs!r}, the model has {name}={ours!r}'
        for name, theirs, ours in _differing(stated.config, own.config)
        if name in names
    )


def saved_with(stated: StatedExperts | None, model: nn.Module) -> str:
    """Options that a source of the same method has otherwise, for the end of a refusal."""
    own = experts_of(model)
    if own is None or own.config is None or stated is None or stated.config is None:
        return ''
    pairs = _differing(stated.config, own.config) if own.method == stated.method else []
    theirs = ', '.join(f'{name}={before!r}' for name, before, _ in pairs)
    ours = ', '.join(f'{name}={after!r}' for name, _, after in pairs)
    return f'; saved with {theirs}, the model has {ours}' if pairs else ''


def _differing(theirs: MoeConfig, ours: MoeConfig) -> list[tuple[str, Any, Any]]:
    """Options that differ, and both values; what one of both does not use is not theirs to say."""
    unused = {**theirs.unused(), **ours.unused()}
    names = (field.name for field in fields(theirs) if field.name not in unused)
    both = ((name, getattr(theirs, name), getattr(ours, name)) for name in names)
    return [(name, before, after) for name, before, after in both if before != after]
