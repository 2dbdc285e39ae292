"""Rows by name: dense models, and all methods that have a form with the compute of the others."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from mmengine.config import Config

from vqmoe_vision.engine.config import parse_options
from vqmoe_vision.models.create import STARTS, create_model
from vqmoe_vision.models.hosts import method_of
from vqmoe_vision.models.layers import MOE_LAYERS, resolve_moe_layers
from vqmoe_vision.models.vit_moe import SIZES
from vqmoe_vision.moe import METHODS

_NAMES = {'hashmoe': 'position'}  # of rows by method, where that says less
_METHODS = {
    _NAMES.get(name, name): name
    for name, method in METHODS.items()
    if 'matched' in method.config.PRESETS
}
# Rows that need a dense checkpoint of the same training set, by whose features they decide.
FEATURE_ROWS = tuple(row for row, name in _METHODS.items() if METHODS[name].needs_features)
ROWS = ('dense_1x', 'dense_2x', *(row for row in _METHODS if row not in FEATURE_ROWS))
# Rows that a learned router has to beat: they learn nothing of where tokens go.
CONTROLS = ('position', 'smoe_frozen')


def _other_presets() -> dict[str, tuple[str, str]]:
    found = {}
    for name, method in METHODS.items():
        kind, seen = method.config, []
        for preset in sorted(kind.PRESETS, key=lambda preset: preset != 'matched'):
            if (config := kind.from_options(preset=preset)) in seen or method.needs_features:
                continue
            seen.append(config)
            if preset != 'matched':
                found[f'{_NAMES.get(name, name)}_{preset}'] = (name, preset)
    return found


# Method and preset of further rows: the papers' own forms, and what else a method names. Their
# compute may be another.
PRESET_ROWS = _other_presets()
# as the paper: "small, 10M" and "large, 110M"
NUM_EXPERTS = {size: 4 if size in ('base', 'large') else 8 for size in SIZES}


def row_options(
    row: str, size: str | None = 'tiny', model: str = 'model', moe_blocks: int = 2
) -> list[str]:
    """The options that make a row of any config; without a size it keeps its model of timm."""
    known = (*ROWS, *FEATURE_ROWS, *PRESET_ROWS)
    if row not in known:
        raise ValueError(f'row {row!r} does not exist; those that need no options are {known}')
    method, preset = PRESET_ROWS.get(row, (_METHODS.get(row, ''), None))
    if method:
        options = [f'{model}.moe.method={method}']
        if size is not None:
            experts = f'{model}.moe.num_experts={NUM_EXPERTS[size]}'
            options = [f'{model}.model_name=vit_{size}_{method}', experts]
        return options if preset is None else [*options, f'{model}.moe.preset={preset}']
    name = [] if size is None else [f'{model}.model_name=vit_{size}_patch16_224']
    wider = [f'{model}.extra_mlps={moe_blocks}'] if row == 'dense_2x' else []
    return [*name, f'{model}.moe=None', *wider]


class Backbone(NamedTuple):
    """The model of a config, which rows make others of."""

    path: str
    field: str  # that holds the model
    size: str | None  # key of `SIZES`; None of a model of timm, which rows keep
    dense: bool
    started: bool  # from weights
    moe_blocks: int

    def options(self, row: str) -> list[str]:
        """The options that make a row of it."""
        options = row_options(row, self.size, self.field, self.moe_blocks)
        if self.dense and row not in ('dense_1x', 'dense_2x'):
            raise ValueError(
                f'{self.path}: {self.field}.moe=None makes a dense model, and row {row} cannot '
                'be made of it; name a config with experts, of which dense_1x can'
            )
        return options


def backbone_of(path: str, config: Config, of_all_rows: Sequence[str] = ()) -> Backbone:
    """The model of a config with the options of all rows."""
    model = config.get('model', {})
    field = 'model.backbone' if 'backbone' in model else 'model'
    model = model.get('backbone', model)
    name, moe, size = model.get('model_name'), model.get('moe'), None
    if not isinstance(name, str):
        raise ValueError(f'{path}: {field}.model_name={name!r} must be the name of a model')
    if method_of(name) is not None:
        size = name.split('_')[1]
        if size not in SIZES:
            raise ValueError(f'{path}: {field}.model_name={name!r} is of no size of {[*SIZES]}')
    dense, blocks = size is None and moe is None, 2
    if not dense:
        option = f'{field}.depth'
        given = parse_options([each for each in of_all_rows if each.startswith(f'{option}=')])
        depth = given.get(option, model.get('depth'))
        if depth is None:
            depth = _depth(name) if size is None else SIZES[size]['depth']
        blocks = len(resolve_moe_layers((moe or {}).get('moe_layers', MOE_LAYERS), depth))
    started = any(model.get(weights) for weights in STARTS)
    return Backbone(path, field, size, dense, started, blocks)


@cache
def _depth(model_name: str) -> int:
    with torch.device('meta'):
        model: Any = create_model(model_name)
    return len(model.blocks)
