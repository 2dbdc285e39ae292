"""What both tasks ask of timm: options of the MoE layers, the width of a dense model, mistakes."""

import json
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

from vqmoe_vision.models import complexity
from vqmoe_vision.models.create import create_model, create_to_start, without_weights
from vqmoe_vision.moe import METHODS

SMALL = dict(img_size=8, patch_size=4, embed_dim=12, depth=4, num_heads=3, num_classes=4)
DENSE = 'vit_tiny_patch16_224'


def test_options_of_the_moe_layers_reach_the_model() -> None:
    moe = dict(preset='group', num_experts=2, moe_layers=[0])
    model = create_model('vit_tiny_smoe', moe, **SMALL)
    assert model.moe_config == METHODS['smoe'].config.from_options(preset='group', num_experts=2)
    assert [hasattr(block.mlp, 'experts') for block in model.blocks] == [True, False, False, False]
    assert moe == dict(preset='group', num_experts=2, moe_layers=[0])


@pytest.mark.parametrize(
    ('name', 'moe'),
    [('vit_tiny_smoe', None), ('vit_tiny_smoe.untrained', {'top_k': 1}), (DENSE, None)],
)
def test_options_may_be_left_out(name: str, moe: dict | None) -> None:
    model = create_model(name, moe, **SMALL).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 8, 8)).shape == (1, 4)


@pytest.mark.parametrize(
    ('extra_mlps', 'options', 'hidden'),
    [
        (2, {}, 72),  # 48 in four blocks, and two more: 48 * 6 / 4
        (1, {}, 60),
        (2, {'mlp_ratio': 2.0}, 36),
        (2, {'depth': 12}, 56),
    ],
)
def test_a_dense_model_is_widened_by_mlps(extra_mlps: int, options: dict, hidden: int) -> None:
    model = create_model(DENSE, extra_mlps=extra_mlps, **{**SMALL, **options})
    plain = create_model(DENSE, **{**SMALL, **options})
    assert {block.mlp.fc1.out_features for block in model.blocks} == {hidden}
    # 4 patches and the class token through two products of 12 x hidden, for each MLP
    one = 5 * 2 * 12 * plain.blocks[0].mlp.fc1.out_features
    assert complexity(model).macs - complexity(plain).macs == extra_mlps * one


def test_widening_draws_no_random_number() -> None:
    torch.manual_seed(0)
    ratio = create_model(DENSE, mlp_ratio=6.0, **SMALL).state_dict()
    torch.manual_seed(0)
    extra = create_model(DENSE, extra_mlps=2, **SMALL).state_dict()
    torch.testing.assert_close(extra, ratio, rtol=0, atol=0)


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        (DENSE, {'moe': {'top_k': 2}}, r'moe\.method=None is not possible: one of '),
        (DENSE, {'moe': {}}, r'moe\.method=None is not possible: one of '),
        ('vit_tiny_vqmoe', {'moe': 'None '}, "moe='None ' is not possible: a dictionary"),
        (
            'vit_tiny_smoe',
            {'moe': {'num_experts': 8}, 'num_experts': 2},
            r'^num_experts=2 is not possible: moe\.num_experts=8 is set, change it',
        ),
        (DENSE, {'extra_mlps': -1}, 'extra_mlps=-1 is not possible: a whole number'),
        (DENSE, {'extra_mlps': 1.5}, r'extra_mlps=1\.5 is not possible: a whole number'),
        ('vit_tiny_smoe', {'extra_mlps': 2}, 'extra_mlps=2 .* vit_tiny_smoe is no dense'),
    ],
)
def test_mistakes(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, **SMALL, **options)


SOURCES = {'pretrained': True, 'upcycle': 'a.pth', 'checkpoint_path': 'b.pth'}


@pytest.mark.parametrize(
    ('name', 'moe', 'first', 'second'),
    [
        *(('vit_tiny_smoe', None, *pair) for pair in combinations(SOURCES, 2)),
        # `upcycle` is refused alone
        *((name, None, 'pretrained', 'checkpoint_path') for name in (DENSE, 'resnet18')),
        (DENSE, {'method': 'smoe'}, 'pretrained', 'checkpoint_path'),
    ],
)
def test_weights_from_two_places_are_refused(
    name: str, moe: dict | None, first: str, second: str
) -> None:
    named = f'{first}={SOURCES[first]!r} is not possible: .* with {second}={SOURCES[second]!r}'
    with pytest.raises(ValueError, match=f'^{named}$'):
        create_model(name, moe, **{key: SOURCES[key] for key in (first, second)})


@pytest.mark.parametrize(
    ('name', 'hint'),
    [
        ('vit_tiny_vqmo', r'did you mean vit_tiny_vqmoe\?$'),
        ('vit_smal_patch16_224', r'did you mean vit_small_patch16_224\?$'),
        ('xyz', r'timm\.list_models\(\) lists them$'),
    ],
)
def test_an_unknown_model_gets_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f'^model_name={name!r} is not a timm model; {hint}'):
        create_model(name)


def test_only_a_vision_transformer_is_widened() -> None:
    with pytest.raises(ValueError, match='resnet18 is no dense vision transformer'):
        create_model('resnet18', extra_mlps=2)


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        (DENSE, {'img_size': 9}, 'img_size=9 is not possible: a multiple of patch_size=4x4'),
        (DENSE, {'weight_init': 'skip'}, "weight_init='skip' is not possible"),
        (DENSE, {'mlp_ratio': 0.01}, r'mlp_ratio=0\.01 is not possible: wide enough'),
        (DENSE, {'drop_path_rate': 2}, 'drop_path_rate=2 is not possible: from 0 to 1'),
        # of other timm models, too: timm cuts off what does not fill a patch
        ('deit_tiny_patch16_224', {'img_size': 9}, 'img_size=9 is not possible: a multiple of'),
    ],
)
def test_arguments_that_timm_takes_amiss(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f'^{message}'):
        create_model(name, **{**SMALL, **options})


@pytest.mark.parametrize(
    ('name', 'options', 'argument'),
    [
        (DENSE, {'foo': 1}, 'foo'),
        (DENSE, {'upcycling': {'drop': 0.5}}, 'upcycling'),
        (DENSE, {'upcycle': 'a.pth'}, 'upcycle'),
        (DENSE, {'moe': {'method': 'smoe', 'foo': 1}}, 'foo'),
        ('vit_tiny_vqmoe', {'moe': {'top_k': 2}}, 'top_k'),
    ],
)
def test_timm_names_an_argument_that_no_part_has(name: str, options: dict, argument: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
        create_model(name, **SMALL, **options)


@pytest.mark.parametrize(
    'given',
    [
        dict(model_name='vit_tiny_smoe', upcycle='local-dir:{}'),
        dict(model_name='vit_tiny_smoe', upcycle='{}/model.safetensors'),
        dict(
            model_name=DENSE,
            pretrained=True,
            pretrained_cfg_overlay={'file': '{}/model.safetensors'},
        ),
        dict(model_name=DENSE, moe={'method': 'smoe'}, checkpoint_path='{}/model.safetensors'),
        dict(
            model_name='vit_tiny_smoe',
            pretrained_cfg={'file': '{}/model.safetensors'},
            pretrained=True,
        ),
    ],
    ids=str,
)
def test_a_model_without_its_weights_is_the_same_network(given: dict, tmp_path: Path) -> None:
    size = {**SMALL, 'img_size': 16}
    source = timm.create_model(DENSE, **size)
    source.pretrained_cfg.update(input_size=(3, 16, 16), fixed_input_size=True)
    save_for_hf(source, tmp_path, safe_serialization=True)
    arguments = json.loads(json.dumps({**size, **given}).replace('{}', str(tmp_path)))
    del arguments['img_size']  # the file beside the weights says it
    (tmp_path / 'model.safetensors').rename(tmp_path / 'elsewhere')
    with pytest.raises(ValueError, match=r'does not exist|weights in folder'):
        create_model(**arguments)
    without = without_weights({**arguments, 'checkpoint': None})
    assert without.pop('checkpoint') is None
    assert create_to_start(**without).patch_embed.img_size == (16, 16)
    (tmp_path / 'elsewhere').rename(tmp_path / 'model.safetensors')
    expected, found = create_model(**arguments), create_to_start(**without)
    assert found.patch_embed.img_size == expected.patch_embed.img_size
    assert found.pretrained_cfg['num_classes'] == expected.pretrained_cfg['num_classes']
    shutil.rmtree(tmp_path)  # with the file that says it, the model's own size is left
    gone = create_to_start(**without_weights(arguments))
    assert gone.patch_embed.img_size == (224, 224)
