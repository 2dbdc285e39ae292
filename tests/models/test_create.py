"""What both tasks ask of timm: options of the MoE layers, the width of a dense model, mistakes."""

import json
import shutil
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vqmoe_vision.models import complexity
from vqmoe_vision.models.create import (
    create_model,
    create_to_start,
    options_in_full,
    share_start,
    without_weights,
)
from vqmoe_vision.moe import METHODS

from .. import cases, refused
from ..variants import VARIANTS
from .conftest import DENSE, DINOV3, TINY

SMALL = dict(img_size=8, patch_size=4, embed_dim=12, depth=4, num_heads=3, num_classes=4)
OURS, FILE = 'vit_tiny_smoe', '{}/model.safetensors'


def test_options_of_the_moe_layers_reach_the_model():
    moe = dict(method='smoe', preset='group', num_experts=2, moe_layers=[0])
    model = create_model('vit_tiny_smoe', moe, **SMALL)  # which says the method too
    assert model.moe_config == METHODS['smoe'].config.from_options(preset='group', num_experts=2)
    assert [hasattr(block.mlp, 'experts') for block in model.blocks] == [True, False, False, False]
    assert moe == dict(method='smoe', preset='group', num_experts=2, moe_layers=[0])


@cases(
    'extra_mlps, options, hidden',
    (2, {}, 72),  # 48 in four blocks, and two more: 48 * 6 / 4
    (1, {}, 60),
    (2, {'mlp_ratio': 2.0}, 36),
    (2, {'depth': 12}, 56),
)
def test_a_dense_model_is_widened_by_mlps(extra_mlps, options, hidden):
    model = create_model(DENSE, extra_mlps=extra_mlps, **{**SMALL, **options})
    plain = create_model(DENSE, **{**SMALL, **options})
    assert {block.mlp.fc1.out_features for block in model.blocks} == {hidden}
    # 4 patches and the class token through two products of 12 x hidden, for each MLP
    one = 5 * 2 * 12 * plain.blocks[0].mlp.fc1.out_features
    assert complexity(model).macs - complexity(plain).macs == extra_mlps * one


@cases(
    'given',
    dict(model_name=OURS, upcycle='local-dir:{}'),
    dict(model_name=OURS, upcycle=FILE),
    dict(model_name=DENSE, pretrained=True, pretrained_cfg_overlay={'file': FILE}),
    dict(model_name=DENSE, moe={'method': 'smoe'}, checkpoint_path=FILE),
    dict(model_name=OURS, pretrained=True, pretrained_cfg={'file': FILE}),
    ids=str,
)
def test_a_model_without_its_weights_is_the_same_network(given, tmp_path):
    size = {**SMALL, 'img_size': 16}
    source = timm.create_model(DENSE, **size)
    source.pretrained_cfg.update(input_size=(3, 16, 16), fixed_input_size=True)
    save_for_hf(source, tmp_path, safe_serialization=True)
    arguments = json.loads(json.dumps({**size, **given}).replace('{}', str(tmp_path)))
    del arguments['img_size']  # the file beside the weights says it
    (tmp_path / 'model.safetensors').rename(tmp_path / 'elsewhere')
    refused(r'does not exist|weights in folder', create_model, **arguments)
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


SIZES = {'depth': 2, 'embed_dim': 24, 'num_heads': 2, 'img_size': 32, 'num_classes': 3}


@pytest.mark.parametrize('method, options', VARIANTS.values(), ids=VARIANTS)
def test_options_in_full_are_those_of_the_model(method, options):
    name = f'vit_tiny_{method}'
    found = options_in_full({'model_name': name, 'moe': options, **SIZES})
    assert found.pop('method') == method
    assert json.loads(json.dumps(found)) == found
    with torch.device('meta'):
        model: Any = create_model(name, options, **SIZES)
    config = model.moe_config
    assert found == {n: v for n, v in asdict(config).items() if n not in config.unused()}
    assert options_in_full({'model_name': name, **options}) == {'method': method, **found}
    host = {'model_name': 'vit_tiny_patch16_224', 'moe': {'method': method, **options}}
    assert options_in_full(host) == {'method': method, **found}


@pytest.mark.parametrize('name', ['test_vit_vqmoe', 'test_vit_dense'])
def test_the_weights_come_with_the_package_and_see_a_cat(name):
    assert f'{name}.cifar10' in timm.list_models(pretrained=True)
    model = timm.create_model(name, pretrained=True).eval()
    file = Path(model.pretrained_cfg['file'])
    assert file.stat().st_size < 2e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    photo = Image.open(files('vqmoe_vision.models') / 'weights/cat.jpg')
    images = create_transform(**resolve_model_data_config(model))(photo)[None]
    assert model.pretrained_cfg['label_names'][model(images).argmax()] == 'cat'


def test_one_is_upcycled_from_the_other_and_not_from_its_own_weights():
    dense = timm.create_model('test_vit_dense', pretrained=True).eval()
    options = dict(form='discrete', expert_input='token', input_norm=False)
    sparse = timm.create_model('test_vit_vqmoe', upcycle='test_vit_dense', **options).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(sparse(images), dense(images), rtol=1e-5, atol=1e-5)


MOE = dict(method='smoe', moe_layers=[0, 1, 3])
# all that timm has but its default, and 'skip', which is refused
MODES = set(get_args(get_type_hints(VisionTransformer.__init__)['weight_init'])) - {'', 'skip'}


def spreads(model: Any) -> list[float]:
    """Standard deviation of the output layer of each MLP, or of its experts."""
    weights = [getattr(block.mlp, 'experts', block.mlp).fc2.weight for block in model.blocks]
    return [weight.std().item() for weight in weights]


def fresh(name: str, shared: bool, **options: Any) -> nn.Module:
    moe = {k: v for k, v in MOE.items() if name != OURS or k != 'method'}
    model = create_model(name, moe, **{**TINY, **options})
    if shared:
        share_start(model, name, seed=3, **{**TINY, **options})
    return model


@pytest.mark.parametrize('shared', [False, True])
@cases(
    'name, options, scaled',
    (OURS, {}, False),
    (OURS, {'fix_init': True}, True),
    (DENSE, {}, False),
    (DENSE, {'fix_init': True}, True),
    (DINOV3, {}, True),
)
def test_fresh_experts_are_spread_as_the_mlps_in_their_place(name, options, scaled, shared):
    dense = timm.create_model(DENSE if name == OURS else name, **{**TINY, **options})
    found = spreads(fresh(name, shared, **options))
    assert found == pytest.approx(spreads(dense), rel=0.05)  # 0.5 % by chance
    expected = [0.02 / (2 * i) ** 0.5 if scaled else 0.02 for i in range(1, 5)]
    assert found == pytest.approx(expected, rel=0.05)


def check_parts(model: Any, weight_init: str) -> None:
    """Each parameter of the experts is spread as that of an MLP, and no expert is another."""
    dense = timm.create_model(DENSE, **TINY, weight_init=weight_init)
    experts = model.blocks[1].mlp.experts
    for name, own in dense.blocks[1].mlp.named_parameters():
        ours = experts.get_parameter(name)
        tolerance = 0.05 if own.ndim == 2 else 0.5  # of biases there are few
        assert ours.std().item() == pytest.approx(own.std().item(), rel=tolerance), name
        assert ours.mean().item() == pytest.approx(0, abs=0.02)
        assert own.ndim == 1 or not ours[0].equal(ours[1])


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('name', [OURS, DENSE])
@pytest.mark.parametrize('weight_init', sorted(MODES))
def test_weight_init_is_that_of_the_experts_too(name, weight_init, shared):
    model = fresh(name, shared, weight_init=weight_init)
    check_parts(model, weight_init)
    model.init_weights()  # of timm: draws all of it again
    check_parts(model, weight_init)


@cases('name, dense', ('test_vit_vqmoe', 'test_vit_dense'), ('vit_tiny_vqmoe', DENSE))
def test_the_rest_is_that_of_the_dense_model_of_the_shape(name, dense):
    models = [timm.create_model(each, img_size=32) for each in (name, dense)]
    for model, each in zip(models, (name, dense), strict=True):
        share_start(model, each, seed=3, img_size=32)
    ours, theirs = (model.state_dict() for model in models)
    shared = [key for key in theirs if key in ours]
    assert 'blocks.1.attn.qkv.weight' in shared and 'head.weight' in shared
    assert all(ours[key].equal(theirs[key]) for key in shared)
