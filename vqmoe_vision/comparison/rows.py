"""Rows by name: dense models, and all methods that have a form with the compute of the others."""

from vqmoe_vision.models.vit_moe import SIZES
from vqmoe_vision.moe import METHODS

_MATCHED = [name for name, method in METHODS.items() if 'matched' in method.config.PRESETS]
# Rows that need a dense checkpoint of the same training set, by whose features they decide.
FEATURE_ROWS = tuple(name for name in _MATCHED if METHODS[name].needs_features)
ROWS = ('dense', 'dense_wide', *(name for name in _MATCHED if name not in FEATURE_ROWS))


def _learns_routing(method: str, preset: str) -> bool:
    return METHODS[method].config.from_options(preset=preset).learns_routing


def _other_presets() -> dict[str, tuple[str, str]]:
    found = {}
    for name, method in METHODS.items():
        if method.needs_features:
            continue
        seen = [method.config.from_options(preset='matched')] if name in ROWS else []
        for preset in method.config.PRESETS:
            config = method.config.from_options(preset=preset)
            if config not in seen:
                seen.append(config)
                found[f'{name}_{preset}'] = (name, preset)
    return found


# Method and preset of further rows: the papers' own forms, and what else a method names. Their
# compute may be another.
PRESET_ROWS = _other_presets()
# Rows that a learned router has to beat: methods that learn nothing of where tokens go, and presets
# that freeze what a method learns of it.
CONTROLS = (
    *(row for row in ROWS if row in METHODS and not _learns_routing(row, 'matched')),
    *(
        row
        for row, (name, preset) in PRESET_ROWS.items()
        if _learns_routing(name, 'paper') and not _learns_routing(name, preset)
    ),
)
# as the paper: "small, 10M" and "large, 110M"
NUM_EXPERTS = {size: 4 if size in ('base', 'large') else 8 for size in SIZES}


def row_options(row: str, size: str = 'tiny', model: str = 'model') -> list[str]:
    """The options that make a row of any config.

    Args:
        row: One of `ROWS`, of which `dense_wide` has the compute of two experts per token, of
            `FEATURE_ROWS`, or of `PRESET_ROWS`.
        size: Key of `SIZES`.
        model: Field that holds the timm model: 'model', or 'model.backbone'.

    Raises:
        ValueError: There is no such row.
    """
    known = (*ROWS, *FEATURE_ROWS, *PRESET_ROWS)
    if row not in known:
        raise ValueError(f'row {row!r} does not exist; those that need no options are {known}')
    method, preset = PRESET_ROWS.get(row, (row, None))
    if method in METHODS:
        experts = f'{model}.moe.num_experts={NUM_EXPERTS[size]}'
        options = [f'{model}.model_name=vit_{size}_{method}', experts]
        return options if preset is None else [*options, f'{model}.moe.preset={preset}']
    wider = [f'{model}.extra_mlps=2'] if row == 'dense_wide' else []
    return [f'{model}.model_name=vit_{size}_patch16_224', f'{model}.moe=None', *wider]
