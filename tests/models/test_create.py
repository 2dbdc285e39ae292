"""What both tasks ask of timm: options of the MoE layers, the width of a dense model, mistakes."""

import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vqmoe_vision import collect_losses
from vqmoe_vision.models import complexity
from vqmoe_vision.models.create import create_model, options_in_full, share_start
from vqmoe_vision.moe import METHODS

from .. import cases
from ..variants import VARIANTS
from .conftest import DENSE, DINOV3, TINY, WITH_GATE

SMALL = dict(img_size=8, patch_size=4, embed_dim=12, depth=4, num_heads=3, num_classes=4)
OURS = 'vit_tiny_smoe'


@cases(
    'extra_mlps, options, hidden',
    (2, {}, 72),  # 48 in four blocks, and two more: 48 * 6 / 4
    (1, {'mlp_ratio': 2.0}, 30),  # 24 * 5 / 4
    (2, {'depth': 12}, 56),
)
def test_a_dense_model_is_widened_by_mlps(extra_mlps, options, hidden):
    model = create_model(DENSE, extra_mlps=extra_mlps, **{**SMALL, **options})
    plain = create_model(DENSE, **{**SMALL, **options})
    assert {block.mlp.fc1.out_features for block in model.blocks} == {hidden}
    # 4 patches and the class token through two products of 12 x hidden, for each MLP
    one = 5 * 2 * 12 * plain.blocks[0].mlp.fc1.out_features
    assert complexity(model).macs - complexity(plain).macs == extra_mlps * one


SIGLIP = 'vit_so400m_patch14_siglip_384'  # 384 = 27 * 14 + 6: timm leaves six rows out


@pytest.mark.parametrize('method', METHODS)
def test_experts_in_a_release_whose_images_are_no_whole_patches(method):
    sizes = {'embed_dim': 16, 'depth': 1, 'num_heads': 1, 'num_classes': 3}
    options = {'method': method, 'moe_layers': (0,), 'num_experts': 2}
    model: Any = create_model(SIGLIP, options, **sizes)
    images = torch.randn(2, 3, 384, 384)
    with collect_losses(model) as collected:
        assert model(images).isfinite().all() and collected.total().isfinite()
    model.eval()
    cut = images.clone()
    cut[:, :, 27 * 14 :] = 5
    if method != 'stablemoe':  # which averages all rows into its cells
        assert torch.equal(model(cut), model(images))
    for sizing in ({'img_size': 380}, {'patch_size': 10}):
        with pytest.raises(ValueError, match=r'img_size=.* a multiple of patch_size'):
            create_model(SIGLIP, options, **sizes, **sizing)


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


@pytest.mark.parametrize('shared', [False, True])
@cases(
    'name, options',
    *((name, {'weight_init': mode}) for name in (OURS, DENSE) for mode in sorted(MODES)),
    *((OURS, {'weight_init': 'jax', **options}) for options in WITH_GATE.values()),
)
def test_weight_init_is_that_of_the_experts_too(name, options, shared):
    model: Any = fresh(name, shared, **options)
    dense = timm.create_model(DENSE, **TINY, **options)
    for again in (False, True):
        if again:
            model.init_weights()  # of timm: draws all of it again
        for part, own in dense.blocks[1].mlp.named_parameters():
            ours = model.blocks[1].mlp.experts.get_parameter(part)
            tolerance = 0.05 if own.ndim == 2 else 0.5  # of biases there are few
            expected = pytest.approx(own.std().item(), rel=tolerance, abs=1e-7)
            assert ours.std().item() == expected, part
            noise = min(0.05, 5 * own.std().item() / own.numel() ** 0.5 + 1e-7)
            assert ours.mean().item() == pytest.approx(own.mean().item(), abs=noise)
            # no expert is another
            assert own.ndim == 1 or not ours[0].equal(ours[1])


@cases('name, dense', ('test_vit_vqmoe', 'test_vit_dense'), ('vit_tiny_vqmoe', DENSE))
def test_the_rest_is_that_of_the_dense_model_of_the_shape(name, dense):
    models = [timm.create_model(each, img_size=32) for each in (name, dense)]
    for model, each in zip(models, (name, dense), strict=True):
        share_start(model, each, seed=3, img_size=32)
    ours, theirs = (model.state_dict() for model in models)
    shared = [key for key in theirs if key in ours]
    assert 'blocks.1.attn.qkv.weight' in shared and 'head.weight' in shared
    assert all(ours[key].equal(theirs[key]) for key in shared)
