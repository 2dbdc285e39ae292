"""Rows by name: dense models, and all methods that have a form with the compute of the others."""

from vqmoe_vision.models.vit_moe import SIZES
from vqmoe_vision.moe import METHODS

ROWS = (
    *('dense', 'dense_wide'),
    *(name for name, method in METHODS.items() if 'matched' in method.config.PRESETS),
)
# as the paper: "small, 10M" and "large, 110M"
NUM_EXPERTS = {size: 4 if size in ('base', 'large') else 8 for size in SIZES}


def row_options(row: str, size: str = 'tiny', model: str = 'model') -> list[str]:
    """The options that make a row of any config.

    Args:
        row: One of `ROWS`; `dense_wide` has the compute of two experts per token.
        size: Key of `SIZES`.
        model: Field that holds the timm model: 'model', or 'model.backbone'.

    Raises:
        ValueError: There is no such row.
    """
    if row not in ROWS:
        raise ValueError(f'row {row!r} does not exist; those that need no options are {ROWS}')
    if row in METHODS:
        name, experts = f'vit_{size}_{row}', NUM_EXPERTS[size]
        return [f'{model}.model_name={name}', f'{model}.moe.num_experts={experts}']
    wider = [f'{model}.extra_mlps=2'] if row == 'dense_wide' else []
    return [f'{model}.model_name=vit_{size}_patch16_224', f'{model}.moe=None', *wider]
