"""Rows by name: dense models, and all methods that have a form with the compute of the others."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from mmengine.config import Config

from vqmoe_vision.engine.config import parse_options
from vqmoe_vision.models.create import STARTS, create_model
from vqmoe_vision.models.layers import MOE_LAYERS, method_of, resolve_moe_layers
from vqmoe_vision.models.vit_moe import SIZES
from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe.config import check

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
# Method and preset of further rows: the papers' own forms, and what else a method names. Their
# compute may be another.
PRESET_ROWS = {
    f'{row}_{preset}': (name, preset)
    for row, name in _METHODS.items()
    if row not in FEATURE_ROWS
    for kind in [METHODS[name].config]
    for preset in kind.PRESETS
    if kind.from_options(preset=preset) != kind.from_options(preset='matched')
}
# as the paper: "small, 10M" and "large, 110M"
NUM_EXPERTS = {size: 4 if size in ('base', 'large') else 8 for size in SIZES}


def row_options(
    row: str, size: str | None = 'tiny', model: str = 'model', moe_blocks: int = 2
) -> list[str]:
    """The options that make a row of any config; without a size it keeps its model of timm."""
    known = (*ROWS, *FEATURE_ROWS, *PRESET_ROWS)
    check(row in known, 'row', row, f'those that need no options are {known}')
    method, preset = PRESET_ROWS.get(row, (_METHODS.get(row), None))
    options = {
        'model_name': size and f'vit_{size}_{method or "patch16_224"}',
        'moe': None if method else 'None',
        'extra_mlps': moe_blocks if row == 'dense_2x' else None,
        'moe.method': None if size else method,
        'moe.num_experts': NUM_EXPERTS[size] if size and method else None,
        'moe.preset': preset,
    }
    return [f'{model}.{name}={value}' for name, value in options.items() if value is not None]


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
        possible = not self.dense or row in ('dense_1x', 'dense_2x')
        allowed = f'with row {row}, which cannot be made of a dense model; dense_1x can of any'
        check(possible, f'{self.path}: {self.field}.moe', None, allowed)
        return row_options(row, self.size, self.field, self.moe_blocks)


def backbone_of(path: str, config: Config, of_all_rows: Sequence[str] = ()) -> Backbone:
    """The model of a config with the options of all rows."""
    model = config.get('model', {})
    field = 'model.backbone' if 'backbone' in model else 'model'
    model = model.get('backbone', model)
    name, moe, size = model.get('model_name'), model.get('moe'), None
    check(isinstance(name, str), f'{path}: {field}.model_name', name, 'the name of a model')
    if method_of(name) is not None:
        size = name.split('_')[1]
        check(size in SIZES, f'{path}: {field}.model_name', name, f'of a size of {[*SIZES]}')
    dense, blocks = size is None and moe is None, 2
    if not dense:
        given = parse_options([each for each in of_all_rows if each.startswith(f'{field}.depth=')])
        depth = given.get(f'{field}.depth', model.get('depth'))
        depth = depth or (SIZES[size]['depth'] if size else _depth(name))
        check(type(depth) is int and depth > 0, f'{field}.depth', depth, 'at least 1')
        blocks = len(resolve_moe_layers((moe or {}).get('moe_layers', MOE_LAYERS), depth))
    started = any(model.get(weights) for weights in STARTS)
    return Backbone(path, field, size, dense, started, blocks)


@cache
def _depth(model_name: str) -> int:
    with torch.device('meta'):
        model: Any = create_model(model_name)
    return len(model.blocks)
