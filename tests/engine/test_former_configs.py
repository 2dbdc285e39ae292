"""A config of before is told what replaces it: one that is there, and options that it takes."""

from operator import attrgetter

import pytest

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.former_configs import replacement

from ..rows import CONFIGS, parse_options

CIFAR_10 = 'classification/cifar10'
ADE = 'segmentation/ade20k'
DEMO = 'classification/digits/demo/vit_tiny_vqmoe_demo'
SCENES = 'segmentation/digit_scenes/segmenter_vit_tiny_vqmoe_digit_scenes'
# by the name of before, without .py: the name of now, and the options under model or model.backbone
REPRESENTATIVES = {
    f'{CIFAR_10}/vit_tiny_vqmoe_cifar10': (CIFAR_10, ''),
    f'{CIFAR_10}/vit_tiny_dense_cifar10': (CIFAR_10, 'model_name=vit_tiny_patch16_224 moe=None'),
    f'{CIFAR_10}/vit_base_dense_wide_cifar10': (
        CIFAR_10,
        'model_name=vit_base_patch16_224 moe=None extra_mlps=2',
    ),
    'classification/cifar100/vit_base_softmoe_cifar100': (
        'classification/cifar100',
        'model_name=vit_base_softmoe moe.num_experts=4',
    ),
    'classification/stl10/vit_tiny_smoe_stl10': (
        'classification/stl10',
        'model_name=vit_tiny_smoe',
    ),
    'classification/svhn/vit_base_vqmoe_svhn': (
        'classification/svhn',
        'model_name=vit_base_vqmoe moe.num_experts=4',
    ),
    'classification/digits/demo/vit_tiny_stablemoe_demo': (DEMO, 'model_name=vit_tiny_stablemoe'),
    'classification/imagenet/vit_base_dense_wide_imagenet': (
        'classification/imagenet/vit_base_dense_imagenet',
        'extra_mlps=2',
    ),
    f'{CIFAR_10}/budget/dense_wide_budget': (
        f'{CIFAR_10}_budget',
        'model_name=vit_tiny_patch16_224 moe=None extra_mlps=2',
    ),
    f'{CIFAR_10}/budget/smoe_budget': (f'{CIFAR_10}_budget', 'model_name=vit_tiny_smoe'),
    f'{CIFAR_10}/budget/vqmoe_budget': (f'{CIFAR_10}_budget', ''),
    f'{CIFAR_10}/budget/vqmoe_token_budget': (f'{CIFAR_10}_budget', 'moe.expert_input=token'),
    f'{CIFAR_10}/budget/vqmoe_32codes_budget': (f'{CIFAR_10}_budget', 'moe.num_codes=32'),
    f'{CIFAR_10}/budget/vqmoe_discrete_budget': (f'{CIFAR_10}_budget', 'moe.form=discrete'),
    f'{CIFAR_10}/budget/vqmoe_official_preset_budget': (
        f'{CIFAR_10}_budget',
        'moe.preset=official moe.expert_input=mix',
    ),
    'segmentation/camvid/segmenter_vit_small_dense_camvid': (
        'segmentation/camvid',
        'model_name=vit_small_patch16_224 moe=None',
    ),
    'segmentation/camvid/budget/segmenter_xmoe_camvid_budget': (
        'segmentation/camvid_budget',
        'model_name=vit_tiny_xmoe',
    ),
    'segmentation/pascal_context/segmenter_vit_tiny_smoe_pascal_context': (
        'segmentation/pascal_context',
        'model_name=vit_tiny_smoe',
    ),
    'segmentation/cityscapes/segmenter_vit_base_stablemoe_cityscapes': (
        'segmentation/cityscapes',
        'model_name=vit_base_stablemoe moe.num_experts=4',
    ),
    'segmentation/digit_scenes/segmenter_vit_tiny_softmoe_digit_scenes': (
        SCENES,
        'model_name=vit_tiny_softmoe',
    ),
    f'{ADE}/segmenter_linear_vit_small_vqmoe_ade20k': (f'{ADE}/segmenter_linear_ade20k', ''),
    f'{ADE}/upernet_vit_base_dense_ade20k': (
        f'{ADE}/upernet_ade20k',
        'model_name=vit_base_patch16_224 moe=None',
    ),
    f'{ADE}/original_schedule/segmenter_vit_small_xmoe_ade20k_original': (
        f'{ADE}/segmenter_original_ade20k',
        'model_name=vit_small_xmoe',
    ),
    # what other configs built on
    '_base_/models/vit_base_smoe': (
        '_base_/models/vit',
        'model_name=vit_base_smoe moe.num_experts=4',
    ),
    '_base_/models/segmenter_vit_large_xmoe': (
        '_base_/models/segmenter',
        'model_name=vit_large_xmoe moe.num_experts=4',
    ),
    '_base_/models/segmenter_vit_tiny': ('_base_/models/segmenter', ''),
    '_base_/models/upernet_vit_base': (f'{ADE}/upernet_ade20k', ''),
    f'{CIFAR_10}/_base_': (CIFAR_10, ''),
    f'{CIFAR_10}/budget/_base_': (f'{CIFAR_10}_budget', ''),
    'segmentation/camvid/_base_': ('segmentation/camvid', ''),
    f'{ADE}/original_schedule/_base_': (f'{ADE}/segmenter_original_ade20k', ''),
    'classification/digits/demo/_base_': (DEMO, ''),
    'segmentation/digit_scenes/_base_': (SCENES, ''),
}


@pytest.mark.parametrize('former', REPRESENTATIVES)
@pytest.mark.parametrize('root', ['', 'configs/', f'{CONFIGS}/'])
def test_a_name_of_before(root: str, former: str) -> None:
    now, options = REPRESENTATIVES[former]
    segmentation = now.startswith('segmentation') or now == '_base_/models/segmenter'
    added = [f'model.{"backbone." * segmentation}{option}' for option in options.split()]
    expected = [f'{root}{now}.py', *(['--cfg-options'] if added else []), *added]
    assert replacement(f'{root}{former}.py') == ' '.join(expected)
    assert not (CONFIGS / f'{former}.py').exists()
    given = parse_options(' '.join(added))
    config = load_config(str(CONFIGS / f'{now}.py'), given)
    assert all(attrgetter(name)(config) == value for name, value in given.items())


@pytest.mark.parametrize(
    'name',
    [
        'none.py',
        'configs/classification/cifar10/vit_tiny_nothing_cifar10.py',
        'configs/classification/cifar10/vit_tiny_smoe_cifar100.py',
        'configs/classification/cifar10/budget/vqmoe_nothing_budget.py',
        'configs/classification/imagenet/vit_small_smoe_imagenet.py',
        'vit_tiny_smoe_cifar10.py',
        # the demo, which digits have alone, has another depth and width
        'configs/classification/digits/vit_base_xmoe_digits.py',
    ],
)
def test_other_names(name: str) -> None:
    assert replacement(name) is None
