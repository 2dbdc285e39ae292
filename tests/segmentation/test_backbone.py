from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
from mmseg.models import VisionTransformer as MMSegViT
from mmseg.registry import MODELS

from vqmoe_vision.models import complexity
from vqmoe_vision.moe import METHODS
from vqmoe_vision.segmentation import TimmViT

from .conftest import TINY, tiny_backbone, tiny_segmentor, training_batch

DINOV3 = 'vit_small_patch16_dinov3'
# a method that looks at raw patches has them of timm's `VisionTransformer` alone
ON_EVA = [name for name, method in METHODS.items() if method.read_patches is None]


def build(*args: Any, **kwargs: Any) -> TimmViT:
    return MODELS.build(tiny_backbone(*args, **kwargs)).eval()


@pytest.mark.parametrize(
    'name', ['vit_tiny_patch16_224', DINOV3, *(f'vit_tiny_{m}' for m in METHODS)]
)
@pytest.mark.parametrize(
    ('height', 'width', 'rows', 'columns'),
    [(32, 32, 4, 4), (37, 50, 5, 7), (1, 9, 1, 2), (8, 200, 1, 25)],
)
def test_any_size(name: str, height: int, width: int, rows: int, columns: int) -> None:
    (features,) = build(name)(torch.randn(2, 3, height, width))
    assert features.shape == (2, 12, rows, columns)
    assert features.isfinite().all()


def test_last_features_are_the_normalised_tokens_of_the_timm_model() -> None:
    backbone = build()
    images = torch.randn(2, 3, 32, 32)
    tokens = backbone.model.forward_features(images)[:, backbone.model.num_prefix_tokens :]
    (features,) = backbone(images)
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens)
    # a layer norm at its start: zero mean over the channels
    torch.testing.assert_close(features.mean(1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)


def test_levels_without_norm_are_outputs_of_blocks() -> None:
    backbone = build('vit_tiny_patch16_224', out_indices=(0, 1), norm=False)
    seen = []
    for block in backbone.model.blocks:
        block.register_forward_hook(lambda *args: seen.append(args[2]))
    levels = backbone(torch.randn(1, 3, 32, 32))
    for level, tokens in zip(levels, seen, strict=True):
        torch.testing.assert_close(level.flatten(2).transpose(1, 2), tokens[:, 1:])


def test_one_block_is_named_as_in_mmseg() -> None:
    chosen = [build('vit_tiny_patch16_224', out_indices=one).out_indices for one in (0, 1, -1)]
    assert chosen == [[0], [1], [1]]


def test_every_parameter_has_a_gradient() -> None:
    for name in ('vit_tiny_patch16_224', DINOV3):
        for options in ({}, dict(out_indices=(0,)), dict(norm=False)):
            backbone = build(name, **options)
            sum(level.square().sum() for level in backbone(torch.randn(1, 3, 32, 32))).backward()
            assert all(p.grad is not None for p in backbone.parameters()), (name, options)


def test_building_inside_mmseg_leaves_the_weights_of_timm() -> None:
    backbone = build()
    before = backbone.model.blocks[0].attn.qkv.weight.clone()
    backbone.init_weights()
    torch.testing.assert_close(backbone.model.blocks[0].attn.qkv.weight, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(model_name='vit_tiny_nothing'), "model_name='vit_tiny_nothing' is not a timm model"),
        (dict(model_name='resnet18'), "'resnet18' is not one of timm's VisionTransformers"),
        (dict(out_indices=(1, 0)), r'out_indices=\(1, 0\) must rise and lie in 0..1'),
        (dict(norm_eps=0.0), 'norm_eps=0.0 is not possible: above 0'),
        (dict(norm_eps=1e6), 'norm_eps=1000000.0 is not possible: .* at most 0.01'),
        (dict(norm_eps='1e-6'), "norm_eps='1e-6' is not possible: float is expected"),
        (dict(out_indices=(2,)), r'out_indices=\(2,\) must rise'),
        (dict(out_indices=-2), 'out_indices=-2 must rise'),
        (dict(model_name='eva02_tiny_patch14_224', moe=dict(method='smoe')), r'MLPs \(SwiGLU\)'),
    ],
)
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    config = {**tiny_backbone('vit_tiny_patch16_224'), **arguments}
    if arguments.get('model_name') == 'resnet18':
        config = dict(type='TimmViT', model_name='resnet18', global_pool='avg')
    with pytest.raises(ValueError, match=message):
        TimmViT(**{k: v for k, v in config.items() if k != 'type'})


def test_dense_weights_of_timm_are_all_used(tmp_path: Any) -> None:
    dense = timm.create_model('vit_tiny_patch16_224', num_classes=7, **TINY)
    path = tmp_path / 'dense.pth'
    torch.save(dense.state_dict(), path)
    backbone = build('vit_tiny_patch16_224', checkpoint=str(path))
    backbone.init_weights()
    images = torch.randn(1, 3, 32, 32)
    tokens = dense.eval().forward_features(images)[:, 1:]
    torch.testing.assert_close(backbone(images)[0].flatten(2).transpose(1, 2), tokens)


def test_experts_start_from_the_mlps_of_a_dense_checkpoint(tmp_path: Any) -> None:
    dense = timm.create_model('vit_tiny_patch16_224', num_classes=7, **TINY)
    path = tmp_path / 'dense.pth'
    torch.save(dense.state_dict(), path)
    backbone = build('vit_tiny_smoe', checkpoint=str(path), moe=dict(renormalize=True))
    backbone.init_weights()
    images = torch.randn(1, 3, 32, 32)
    tokens = dense.eval().forward_features(images)[:, 1:]
    torch.testing.assert_close(backbone(images)[0].flatten(2).transpose(1, 2), tokens)
    assert 'blocks.1.mlp.experts.fc1.weight' in backbone.model.weights_report.copied
    assert backbone.model.weights_report.outside == ('head.weight', 'head.bias')
    shaken = build('vit_tiny_smoe', checkpoint=str(path), upcycling=dict(noise=0.1))
    shaken.init_weights()
    first, second, *_ = shaken.model.blocks[1].mlp.experts.fc1.weight
    assert 0 < (first - second).norm() < 0.3 * first.norm()  # 0.1 * sqrt(2) apart


def test_a_backbone_starts_from_one_place(tmp_path: Any) -> None:
    path = str(tmp_path / 'dense.pth')
    torch.save(timm.create_model('vit_tiny_patch16_224', **TINY).state_dict(), path)
    backbone = build('vit_tiny_smoe', upcycle=path, checkpoint=path)
    with pytest.raises(ValueError, match=r'^upcycle=.* is not possible: None with checkpoint='):
        backbone.init_weights()


@pytest.mark.parametrize('method', [None, *ON_EVA])
def test_a_model_of_dinov3_starts_from_its_weights(method: str | None, tmp_path: Any) -> None:
    dense: Any = timm.create_model(DINOV3, num_classes=0, **TINY)
    path = tmp_path / 'dense.pth'
    torch.save(dense.state_dict(), path)
    exact = next(iter(METHODS[method].config.EXACT_UPCYCLING.values()), {}) if method else {}
    moe = dict(method=method, num_experts=2) | exact if method else None
    backbone = build(DINOV3, checkpoint=str(path), moe=moe)
    backbone.init_weights()
    images = torch.randn(1, 3, 32, 32)
    tokens = dense.eval().forward_features(images)[:, dense.num_prefix_tokens :]
    found = backbone(images)[0].flatten(2).transpose(1, 2)
    if method is None or exact:
        torch.testing.assert_close(found, tokens)
    assert complexity(backbone.model).params >= complexity(dense).params
    assert found.isfinite().all()


@pytest.mark.parametrize('method', ON_EVA)
def test_a_segmentor_trains_experts_of_dinov3(method: str) -> None:
    model = tiny_segmentor(DINOV3, backbone=dict(moe=dict(method=method), num_experts=None)).train()
    losses = model(**training_batch(model), mode='loss')
    total, _ = model.parse_losses(losses)
    total.backward()
    layer = model.routed_model.blocks[1].mlp
    assert any(name.startswith('blocks.1.mlp/') for name in losses) == layer.needs_collecting
    assert all(p.grad is not None for p in layer.experts.parameters())


@pytest.mark.parametrize('prefix', ['backbone.', ''])
def test_weights_of_mmsegs_own_backbone_compute_the_same(tmp_path: Any, prefix: str) -> None:
    theirs = MMSegViT(
        img_size=32, patch_size=8, embed_dims=12, num_layers=2, num_heads=3, final_norm=True,
        norm_cfg=dict(type='LN', eps=1e-6),
    )  # fmt: skip
    theirs.eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / 'theirs.pth'
    torch.save({f'{prefix}{name}': value for name, value in theirs.state_dict().items()}, path)
    backbone = build('vit_tiny_patch16_224', checkpoint=str(path))
    backbone.init_weights()
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(backbone(image)[0], theirs(image)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('moe', [None, {'method': 'smoe'}])
def test_weights_by_name_are_not_half_loaded(moe: dict[str, Any] | None) -> None:
    """There is no head here, of which timm would say that it is why the rest is not strict."""
    sizes: dict[str, Any] = dict(img_size=32, patch_size=16, depth=4, embed_dim=12, num_heads=3)
    state = timm.create_model('vit_tiny_patch16_224', **sizes).state_dict()
    half = {name: value for name, value in state.items() if not name.startswith('blocks.3.')}
    for weights, fits in ((state, True), (half, False)):
        given = dict(pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights))
        match = r'missing keys: blocks\.3\.'
        with nullcontext() if fits else pytest.raises(ValueError, match=match):
            model = TimmViT('vit_tiny_patch16_224', moe=moe, **sizes, **given).model
    assert torch.equal(model.blocks[3].norm1.weight, state['blocks.3.norm1.weight'])
    assert set(model.weights_report.outside) == {'head.weight', 'head.bias'}
