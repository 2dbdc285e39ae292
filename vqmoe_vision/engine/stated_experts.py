"""Experts of a run's config beside what the weights that it reads say of theirs."""

import logging
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from torch import nn

from vqmoe_vision.models.described import describe
from vqmoe_vision.models.origin import origin_of
from vqmoe_vision.models.stated_experts import (
    StatedExperts,
    compare_experts,
    experts_of,
    experts_of_run,
)

from .checkpoint import run_experts


def check_experts(model: nn.Module, path: str, content: Any = None) -> None:
    """Refuses weights of another method, and logs which options of the experts were others."""
    for line in compare_experts(model, _stated(path, content), path):
        print_log(f'{path}: {line}', 'current', logging.WARNING)


def _stated(path: str, content: Any) -> StatedExperts | None:
    origin = origin_of(describe(path), path) if Path(path).exists() else None
    if origin is not None:
        return experts_of(origin.model)
    return run_experts(path) if content is None else experts_of_run(content)
