"""The rows of every comparison, as options of a config: dense models, and all methods there are."""

from pathlib import Path
from typing import Any

from vqmoe_vision.comparison.spec import ROWS as ROWS
from vqmoe_vision.comparison.spec import row_options as named_row_options
from vqmoe_vision.engine.config import parse_options as parse

CONFIGS = Path(__file__).parents[1] / 'configs'
DIGITS = 'classification/digits/demo/vit_tiny_vqmoe_demo.py'
SCENES = 'segmentation/segmenter_vit-4x96-vqmoe_mask_1xb64-1k_digits-48x48.py'


def leaves(part: str) -> list[str]:
    paths = (CONFIGS / part).rglob('*.py')
    return sorted(str(p.relative_to(CONFIGS)) for p in paths if not p.stem.startswith('_base_'))


def ade20k(size: str, row: str) -> str:
    """Stem of the Segmenter of a row of the paper; `row` is 'dense' or a method."""
    backbone = f'vit-{size[0]}' if row == 'dense' else f'vit-{size[0]}-{row}'
    side = 640 if size == 'large' else 512
    return f'segmenter_{backbone}_mask_8xb1-160k_ade20k-{side}x{side}'


def row_options(row: str, size: str = 'tiny', model: str = 'model') -> dict[str, Any]:
    """What `--cfg-options` makes of a row's line of options, where `model` holds the timm model."""
    return parse(named_row_options(row, size, model))


def printed_config(section: str, data_root: str) -> str:
    """The config that a section of docs/how-to/own-data.md prints, for a folder of data."""
    page = (CONFIGS.parent / 'docs/how-to/own-data.md').read_text()
    text = page.split(f'## {section}\n')[1].split('\n```py\n')[1].split('```')[0]
    return text.replace('data/mine', data_root)


def parse_options(line: str) -> dict[str, Any]:
    return parse(line.split())
