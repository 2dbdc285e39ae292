"""What replaces the configs of before, when each data set had a file per size and method."""

import re
from pathlib import PurePath

from vqmoe_vision.moe import METHODS

_READINGS = {
    'token': ['expert_input=token'],
    'official': ['expert_input=official'],
    'ste': ['expert_input=ste'],
    '32codes': ['num_codes=32'],
    'discrete': ['form=discrete'],
    'continuous': ['form=continuous'],
    # the file that it built on set the input
    'official_preset': ['preset=official', 'expert_input=mix'],
}
_DATA = (
    '(?P<task>classification|segmentation)/'
    '(?P<data>cifar10|cifar100|stl10|svhn|camvid|pascal_context|cityscapes)'
)
_ROW = '(?P<row>dense_wide|[a-z]+)'
_NAME = rf'vit_(?P<size>tiny|small|base|large)_{_ROW}'
_READING = rf'(?P<reading>{"|".join(_READINGS)})'
_ADE = 'segmentation/ade20k'
_IMAGENET = 'classification/imagenet'
_DEMO = 'classification/digits/demo'
_SCENES = 'segmentation/digit_scenes'
# By names of before: the config that replaces them, and the model that it has without options.
_TABLE = {
    rf'{_DATA}/(segmenter_)?{_NAME}_(?P=data)': ('{task}/{data}', 'tiny_vqmoe'),
    rf'{_DATA}/budget/(segmenter_)?{_ROW}(_{_READING})?(_camvid)?_budget': (
        '{task}/{data}_budget',
        'tiny_vqmoe',
    ),
    rf'{_IMAGENET}/vit_(?P<size>tiny|base)_(?P<row>dense_wide)_imagenet': (
        f'{_IMAGENET}/vit_{{size}}_dense_imagenet',
        '{size}_dense',
    ),
    rf'{_DEMO}/{_NAME}_demo': (f'{_DEMO}/vit_tiny_vqmoe_demo', 'tiny_vqmoe'),
    rf'{_SCENES}/segmenter_{_NAME}_digit_scenes': (
        f'{_SCENES}/segmenter_vit_tiny_vqmoe_digit_scenes',
        'tiny_vqmoe',
    ),
    rf'{_ADE}/segmenter_linear_{_NAME}_ade20k': (f'{_ADE}/segmenter_linear_ade20k', 'small_vqmoe'),
    rf'{_ADE}/upernet_{_NAME}_ade20k': (f'{_ADE}/upernet_ade20k', 'base_vqmoe'),
    rf'{_ADE}/original_schedule/segmenter_{_NAME}_ade20k_original': (
        f'{_ADE}/segmenter_original_ade20k',
        'small_vqmoe',
    ),
    # files that only other configs named
    rf'_base_/models/{_NAME}': ('_base_/models/vit', 'tiny_vqmoe'),
    rf'_base_/models/segmenter_{_NAME}': ('_base_/models/segmenter', 'tiny_vqmoe'),
    rf'_base_/models/upernet_{_NAME}': (f'{_ADE}/upernet_ade20k', 'base_vqmoe'),
    r'_base_/models/segmenter_vit_[a-z]+': ('_base_/models/segmenter', ''),
    r'_base_/models/upernet_vit_base': (f'{_ADE}/upernet_ade20k', ''),
    rf'{_ADE}/original_schedule/_base_': (f'{_ADE}/segmenter_original_ade20k', ''),
    rf'{_DATA}/budget/_base_': ('{task}/{data}_budget', ''),
    rf'{_DATA}/_base_': ('{task}/{data}', ''),
    rf'{_DEMO}/_base_': (f'{_DEMO}/vit_tiny_vqmoe_demo', ''),
    rf'{_SCENES}/_base_': (f'{_SCENES}/segmenter_vit_tiny_vqmoe_digit_scenes', ''),
}


def replacement(path: str) -> str | None:
    """What to name in place of a config of before: another, and the options that go with it."""
    for pattern, (new, default) in _TABLE.items():
        match = re.fullmatch(
            rf'(?P<root>(.*/|vqmoe_vision::)?){pattern}\.py', PurePath(path).as_posix()
        )
        if match is None:
            continue
        parts = {name: text for name, text in match.groupdict().items() if text is not None}
        if parts.get('row', 'dense') not in {'dense', 'dense_wide', *METHODS}:
            continue
        config = new.format(**parts)
        backbone = '' if re.match('classification/|_base_/models/vit$', config) else 'backbone.'
        options = _options(default.format(**parts), **parts) if default else []
        added = [f'model.{backbone}{option}' for option in options]
        return ' '.join([f'{parts["root"]}{config}.py', *(['--cfg-options'] * bool(added)), *added])
    return None


def _options(
    default: str, row: str, size: str = 'tiny', reading: str | None = None, **_: str
) -> list[str]:
    """What makes the model `default` one of another size and row."""
    options = []
    if f'{size}_{row.removesuffix("_wide")}' != default:
        if row in METHODS:
            options.append(f'model_name=vit_{size}_{row}')
            # the larger sizes had four experts, as in the paper
            options += ['moe.num_experts=4'] if size in ('base', 'large') else []
        else:
            options += [f'model_name=vit_{size}_patch16_224', 'moe=None']
    options += ['extra_mlps=2'] if row == 'dense_wide' else []
    return options + [f'moe.{option}' for option in _READINGS.get(reading or '', [])]
