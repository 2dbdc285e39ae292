from typing import Any

import pytest
import torch
from mmengine.structures import PixelData
from mmseg.models import VisionTransformer as MMSegViT
from mmseg.registry import MODELS

from vqmoe_vision.engine.optim import LayerDecayOptimWrapperConstructor
from vqmoe_vision.moe import METHODS
from vqmoe_vision.segmentation import TimmViT

from .. import cases, refused
from ..runs import total_of
from .conftest import MASK, tiny_backbone, tiny_segmentor, training_batch


@pytest.mark.parametrize('method', METHODS)
def test_every_auxiliary_loss_and_gradient_checkpointing(method):
    runs = []
    for again in (False, True):
        torch.manual_seed(0)
        model = tiny_segmentor(f'vit_tiny_{method}', backbone=dict(grad_checkpointing=again))
        layer, calls = model.routed_model.blocks[1], list[int]()
        layer.attn.register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        entries = model(**training_batch(model), mode='loss')
        total = total_of(model, entries, 'decode.loss_ce', layer.mlp)
        total.backward()
        assert len(calls) == 1 + again
        runs.append((total.detach(), [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize('mode', ['whole', 'slide'])
@pytest.mark.parametrize('size', [(32, 32), (29, 36), (1, 39), (37, 50)])
def test_maps_lie_on_the_pixels_of_their_patches(mode, size, monkeypatch):
    model = tiny_segmentor(test_cfg=dict(mode=mode, crop_size=(56, 56), stride=(8, 8))).eval()
    model.data_preprocessor.test_cfg = None  # images of any size come in

    def logits(maps: Any) -> torch.Tensor:
        """Two classes in turn, patch by patch."""
        odd = torch.ones_like(maps[-1][:, :1]).cumsum(3) % 2
        return torch.cat([odd, 1 - odd, odd - 2, odd - 2], 1)

    monkeypatch.setattr(model.decode_head, 'forward', logits)
    batch = training_batch(model, 40)
    expected = (torch.arange(size[1]) // 8 % 2).expand(1, *size)
    sample = batch['data_samples'][0]
    sample.set_metainfo(dict(img_shape=size, ori_shape=size))
    inputs = [torch.randint(256, (3, *size), dtype=torch.uint8)]
    (result,) = model.test_step(dict(inputs=inputs, data_samples=[sample]))
    assert (result.pred_sem_seg.data == expected).all()
    assert 'blocks.1.mlp/load_unused' in model.routing_statistics.summary()
    for sample in batch['data_samples']:
        sample.gt_sem_seg = PixelData(data=expected)
    found = model.loss(torch.randn(2, 3, *size), batch['data_samples'])
    assert found['decode.acc_seg'] == 100
    assert all(sample.gt_sem_seg.shape == size for sample in batch['data_samples'])


def test_a_batch_without_labels_has_no_task_loss():
    model = tiny_segmentor()
    batch = training_batch(model)
    for sample in batch['data_samples']:
        sample.gt_sem_seg.data.fill_(255)
    losses = model(**batch, mode='loss')
    assert losses['decode.loss_ce'] == 0
    total, _ = model.parse_losses(losses)
    total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in gradients.values())
    # only the auxiliary losses pull, which do not look at labels
    assert not any(grad.any() for name, grad in gradients.items() if 'decode_head' in name)


def test_heads_that_ignore_other_labels_are_refused_where_maps_are_filled_up():
    model = tiny_segmentor(auxiliary_head=dict(FCN, ignore_index=200))
    batch = training_batch(model, 40)
    model.loss(torch.randn(2, 3, 32, 32), batch['data_samples'])  # whole patches
    for sample in batch['data_samples']:
        sample.gt_sem_seg = PixelData(data=torch.zeros((1, 20, 20), dtype=torch.int64))
    with pytest.raises(ValueError, match=r'auxiliary_head\.ignore_index=200'):
        model.loss(torch.randn(2, 3, 20, 20), batch['data_samples'])


FCN = dict(type='FCNHead', num_convs=0, concat_input=False)
LINEAR = dict(FCN, num_classes=4, dropout_ratio=0.0)
UPER = dict(type='UPerHead', in_index=[0, 1], pool_scales=(1, 2), num_classes=4, channels=5)
UPER |= dict(norm_cfg=dict(type='BN'))
NECK = dict(type='MultiLevelNeck', scales=[2, 1])
AUXILIARY = dict(type='FCNHead', in_index=1, channels=6)


def test_neck_and_heads_have_the_width_and_heads_of_the_backbone():
    head = tiny_segmentor(decode_head=MASK).decode_head
    widths = head.in_channels, head.channels, head.cls_emb.shape[-1]
    assert (*widths, head.layers[0].attn.attn.num_heads) == (12, 12, 12, 3)
    narrow = tiny_segmentor(decode_head=dict(MASK, embed_dims=8, num_heads=2)).decode_head
    assert (narrow.in_channels, narrow.cls_emb.shape[-1]) == (12, 8)
    linear = tiny_segmentor(decode_head=LINEAR).decode_head
    assert (linear.in_channels, linear.channels) == (12, 12)
    levels: dict[str, Any] = dict(backbone=dict(out_indices=(0, 1)), decode_head=UPER)
    for width, neck in ((12, NECK), (8, dict(NECK, out_channels=8))):
        for auxiliary in (AUXILIARY, [AUXILIARY] * 2):
            model = tiny_segmentor(**levels, neck=neck, auxiliary_head=auxiliary)
            assert model.neck.in_channels == [12, 12] and model.neck.out_channels == width
            assert (model.decode_head.in_channels, model.decode_head.channels) == ([width] * 2, 5)
            one = model.auxiliary_head[1] if isinstance(auxiliary, list) else model.auxiliary_head
            assert (one.in_channels, one.channels, one.num_classes) == (width, 6, 4)
    total, _ = model.parse_losses(model(**training_batch(model), mode='loss'))
    total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


PRETRAINED = {'type': 'Pretrained', 'checkpoint': 'a.pth'}


@cases(
    'field, config',
    ('decode_head', dict(decode_head=[LINEAR] * 2)),
    ('init_cfg', dict(init_cfg=PRETRAINED)),
    ('decode_head.init_cfg', dict(decode_head=dict(LINEAR, init_cfg=PRETRAINED))),
    ('auxiliary_head.init_cfg', dict(auxiliary_head=[dict(AUXILIARY, init_cfg=[PRETRAINED])])),
    ('neck.init_cfg', dict(neck=dict(NECK, init_cfg=PRETRAINED))),
    ('auxiliary_head.num_classes', dict(auxiliary_head=[dict(AUXILIARY, num_classes=5)])),
    *((f'test_cfg.{name}', dict(test_cfg={name: (8, 8)})) for name in ('strid', 'crop_sise')),
)
def test_what_cannot_be_is_named(field, config):
    refused(rf'^model\.{field}=', tiny_segmentor, **config)


def test_learning_rates_shrink_by_layer_and_decay_is_that_of_timm():
    model = tiny_segmentor()
    keys = {'dec_proj': {'lr_mult': 10.0}, 'blocks.0': {'lr_mult': 3.0, 'decay_mult': 2.0}}
    build = LayerDecayOptimWrapperConstructor(
        {'optimizer': {'type': 'AdamW', 'lr': 1.0, 'weight_decay': 0.3}},
        {'layer_decay': 0.5, 'custom_keys': keys},
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build(model).optimizer.param_groups
    listed = [(names[id(p)], (g['lr'], g['weight_decay'])) for g in groups for p in g['params']]
    found = {name.removeprefix('backbone.model.'): value for name, value in listed}
    assert len(listed) == len(names) == len(found)
    # from the top: heads, norm and last block 1, then halved for each block and the embedding
    expected = {
        'decode_head.cls_emb': (1.0, 0.3),
        'norm.weight': (1.0, 0.0),
        'blocks.1.mlp.experts.fc1.weight': (1.0, 0.3),
        'blocks.1.mlp.experts.fc1.bias': (1.0, 0.0),
        'patch_embed.proj.weight': (0.25, 0.3),
        'pos_embed': (0.25, 0.0),
        'decode_head.dec_proj.weight': (10.0, 0.3),
        'blocks.0.attn.qkv.weight': (3 * 0.5, 0.6),
        'blocks.0.attn.qkv.bias': (3 * 0.5, 0.0),
    }
    assert found.items() >= expected.items()
    for wrong in (None, {'layer_decay': 0.0}, {'layer_decay': 0.5, 'norm_decay': 0}):
        with pytest.raises(ValueError, match=r'^paramwise_cfg\.(layer_decay|norm_decay)='):
            LayerDecayOptimWrapperConstructor({'optimizer': {'lr': 1.0}}, wrong)


VIT, DINOV3 = 'vit_tiny_patch16_224', 'vit_small_patch16_dinov3'


def build(*args: Any, **kwargs: Any) -> TimmViT:
    return MODELS.build(tiny_backbone(*args, **kwargs)).eval()


@pytest.mark.parametrize('name', [VIT, DINOV3, *(f'vit_tiny_{m}' for m in METHODS)])
@pytest.mark.parametrize(
    'height, width, rows, columns', [(32, 32, 4, 4), (37, 50, 5, 7), (1, 9, 1, 2), (8, 200, 1, 25)]
)
def test_any_size(name, height, width, rows, columns):
    (features,) = build(name)(torch.randn(2, 3, height, width))
    assert features.shape == (2, 12, rows, columns)
    assert features.isfinite().all()


def test_every_parameter_has_a_gradient():
    for name in (VIT, DINOV3):
        for options in ({}, dict(out_indices=(0,)), dict(norm=False)):
            backbone = build(name, **options)
            sum(level.square().sum() for level in backbone(torch.randn(1, 3, 32, 32))).backward()
            assert all(p.grad is not None for p in backbone.parameters()), (name, options)


@cases(
    'field, value',
    ('model_name', 'vit_tiny_nothing'),
    ('model_name', 'resnet18'),
    *(('norm_eps', value) for value in (0.0, 1e6, '1e-6')),
    *(('out_indices', value) for value in ((1, 0), (2,), -2, ())),
)
def test_mistakes(field, value):
    config = {**tiny_backbone(VIT), field: value}
    refused(f'^{field}=', MODELS.build, config)


@pytest.mark.parametrize('prefix', ['backbone.', ''])
def test_weights_of_mmsegs_own_backbone_compute_the_same(tmp_path, prefix):
    sizes = dict(img_size=32, patch_size=8, embed_dims=12, num_layers=2, num_heads=3)
    theirs = MMSegViT(**sizes, final_norm=True, norm_cfg=dict(type='LN', eps=1e-6))
    theirs.eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / 'theirs.pth'
    torch.save({f'{prefix}{name}': value for name, value in theirs.state_dict().items()}, path)
    backbone = build(VIT, checkpoint=str(path))
    backbone.init_weights()
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(backbone(image)[0], theirs(image)[0], rtol=1e-4, atol=1e-5)
