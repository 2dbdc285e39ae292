"""What both tasks ask of timm: options of the MoE layers, the width of a dense model, mistakes."""

import json
import shutil
from pathlib import Path

import pytest
import timm
from timm.models import save_for_hf

from vqmoe_vision.models import complexity
from vqmoe_vision.models.create import create_model, create_to_start, without_weights
from vqmoe_vision.moe import METHODS

SMALL = dict(img_size=8, patch_size=4, embed_dim=12, depth=4, num_heads=3, num_classes=4)
DENSE = 'vit_tiny_patch16_224'


def test_options_of_the_moe_layers_reach_the_model() -> None:
    moe = dict(method='smoe', preset='group', num_experts=2, moe_layers=[0])
    model = create_model('vit_tiny_smoe', moe, **SMALL)  # which says the method too
    assert model.moe_config == METHODS['smoe'].config.from_options(preset='group', num_experts=2)
    assert [hasattr(block.mlp, 'experts') for block in model.blocks] == [True, False, False, False]
    assert moe == dict(method='smoe', preset='group', num_experts=2, moe_layers=[0])


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
