"""Mistakes that a comparison shows before its first run: each would end all runs of a row."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.command import as_typed, one_line
from vqmoe_vision.engine.config import parse_options
from vqmoe_vision.engine.trained import without_sources
from vqmoe_vision.moe.config import check

from .runs import Run


def refuse_mistakes(runs: Sequence[Run]) -> None:
    """Builds the model of each row, without memory for it."""
    first: dict[tuple[str, str], Run] = {}
    for run in runs:
        first.setdefault((run.comparison.name, run.row), run)
    for config in dict.fromkeys(run.comparison.config for run in runs):
        load_config(config)  # imports the modules that it names
    for run in first.values():
        config = run.merged()
        scope = config.get('default_scope', 'mmengine')
        with DefaultScope.overwrite_default_scope(scope):
            _build(run, config)
    # many rows start from one checkpoint
    sources = {
        file: (run, source) for run in first.values() for source, file in run.sources.values()
    }
    for file, (run, source) in sources.items():
        _check_left(run, source, file.name)


def _build(run: Run, config: Config) -> None:
    # of a segmentor the backbone alone, which rows differ in
    model = config.model.get('backbone', config.model)
    try:
        fits = not (model.get('pretrained') and model.get('extra_mlps'))
        check(fits, 'extra_mlps', model.get('extra_mlps'), '0 beside pretrained weights')
        with torch.device('meta'):
            MODELS.build(without_sources(model))
    except Exception as error:  # whatever a library makes of a value
        said = as_typed(one_line(error), parse_options(run.options))
        raise ValueError(f'comparison {run.comparison.name}: row {run.row}: {said}') from error


def _check_left(run: Run, source: Run, name: str) -> None:
    """That a training goes on to the checkpoint that is wanted of it, as far as its name says."""
    wanted = re.fullmatch(r'(epoch|iter)_(\d+)\.pth', name)
    if wanted is None:
        return
    last = source.merged().train_cfg.get(f'max_{wanted[1]}s')
    allowed = f'one that {source.comparison.name} leaves, which ends with {wanted[1]} {last}'
    reached = last is None or int(wanted[2]) <= last
    check(reached, f'comparison {run.comparison.name}: start', name, allowed)
