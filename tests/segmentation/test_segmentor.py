from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.structures import PixelData
from mmseg.registry import MODELS

from vqmoe_vision.engine.optim import LayerDecayOptimWrapperConstructor
from vqmoe_vision.moe import METHODS, update_state

from .conftest import tiny_segmentor, training_batch


@pytest.mark.parametrize('method', METHODS)
def test_loss_holds_every_auxiliary_loss_of_the_backbone(method: str) -> None:
    model = tiny_segmentor(f'vit_tiny_{method}')
    entries = model(**training_batch(model), mode='loss')
    assert {'decode.loss_ce', 'decode.acc_seg'} <= entries.keys()
    auxiliary = {k for k in entries if 'loss' in k} - {'decode.loss_ce'}
    assert all(key.startswith('blocks.1.mlp/') for key in auxiliary)
    layer = model.backbone.model.blocks[1].mlp
    assert bool(auxiliary) == layer.needs_collecting
    # without a router every expert has as much to do, and there is no load to report
    logged = model.logged_statistics.summary()
    assert ('blocks.1.mlp/load_max' in logged) == hasattr(layer, 'router')
    total, _ = model.parse_losses(entries)
    parts = sum(entries[key] for key in auxiliary | {'decode.loss_ce'})
    torch.testing.assert_close(total, parts)


def test_codebook_learns_after_the_step_and_not_in_forward() -> None:
    model = tiny_segmentor()
    codes = {n: b for n, b in model.named_buffers() if n.endswith('codebook.embed')}
    before = {name: code.clone() for name, code in codes.items()}
    model(**training_batch(model), mode='loss')
    assert codes and all(torch.equal(codes[name], before[name]) for name in codes)
    update_state(model.routed_model)
    after = dict(model.named_buffers())
    assert all(not torch.equal(after[name], before[name]) for name in codes)


@pytest.mark.parametrize('method', METHODS)
def test_two_steps_are_equal_with_and_without_gradient_checkpointing(method: str) -> None:
    runs = []
    for grad_checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny_segmentor(
            f'vit_tiny_{method}', backbone=dict(grad_checkpointing=grad_checkpointing)
        )
        calls: list[int] = []
        attention = model.routed_model.blocks[1].attn
        attention.register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(2):
            torch.manual_seed(1)
            total, _ = model.parse_losses(model(**training_batch(model), mode='loss'))
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            update_state(model.routed_model)
            losses.append(total.detach())
        # two steps; blocks that are not stored run again in the backward pass
        assert len(calls) == (4 if grad_checkpointing else 2)
        runs.append((losses, model.state_dict()))
    (plain, state), (recomputed, state_again) = runs
    assert plain[0] != plain[1]
    torch.testing.assert_close(recomputed, plain)
    torch.testing.assert_close(state_again, state)


@pytest.mark.parametrize('head', ['mask', 'linear'])
def test_slide_equals_whole_on_an_image_of_crop_size(head: str) -> None:
    linear = dict(
        type='FCNHead', in_channels=12, channels=12, num_convs=0, concat_input=False,
        num_classes=4, dropout_ratio=0.0,
    )  # fmt: skip
    model = tiny_segmentor(**({'decode_head': linear} if head == 'linear' else {})).eval()
    images = torch.randn(2, 3, 32, 32)
    metas = [dict(img_shape=(32, 32), ori_shape=(32, 32)) for _ in images]
    whole = model.inference(images, metas)
    model.test_cfg.update(mode='slide', crop_size=(32, 32), stride=(24, 24))
    torch.testing.assert_close(model.inference(images, metas), whole)


@pytest.mark.parametrize('mode', ['whole', 'slide'])
@pytest.mark.parametrize('size', [(37, 50), (1, 40), (33, 7)])
def test_predictions_have_the_size_of_odd_images(mode: str, size: tuple[int, int]) -> None:
    model = tiny_segmentor(test_cfg=dict(mode=mode, crop_size=(32, 32), stride=(24, 24))).eval()
    batch = training_batch(model)
    sample = batch['data_samples'][0]
    sample.set_metainfo(dict(img_shape=size, ori_shape=size))
    inputs = [torch.randint(256, (3, *size), dtype=torch.uint8)]
    (result,) = model.test_step(dict(inputs=inputs, data_samples=[sample]))
    assert result.pred_sem_seg.shape == size
    assert result.seg_logits.data.isfinite().all()
    assert 'blocks.1.mlp/load_unused' in model.routing_statistics.summary()


@pytest.mark.parametrize('mode', ['whole', 'slide'])
@pytest.mark.parametrize('size', [(32, 32), (29, 36), (1, 39)])
def test_maps_lie_on_the_pixels_of_their_patches(
    mode: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # one window, of all pixels
    model = tiny_segmentor(test_cfg=dict(mode=mode, crop_size=(48, 48), stride=(8, 8))).eval()
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
    for sample in batch['data_samples']:
        sample.gt_sem_seg = PixelData(data=expected)
    found = model.loss(torch.randn(2, 3, *size), batch['data_samples'])
    assert found['decode.acc_seg'] == 100
    assert all(sample.gt_sem_seg.shape == size for sample in batch['data_samples'])


def test_heads_that_ignore_other_labels_are_refused_where_maps_are_filled_up() -> None:
    auxiliary = dict(type='FCNHead', num_convs=0, concat_input=False, ignore_index=200)
    model = tiny_segmentor(auxiliary_head=auxiliary)
    batch = training_batch(model, 40)
    model.loss(torch.randn(2, 3, 32, 32), batch['data_samples'])  # whole patches
    for sample in batch['data_samples']:
        sample.gt_sem_seg = PixelData(data=torch.zeros((1, 20, 20), dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r'auxiliary_head.ignore_index=200 .* 255, as of the decode'
    ):
        model.loss(torch.randn(2, 3, 20, 20), batch['data_samples'])


def test_another_backbone_is_refused() -> None:
    config = dict(
        type='MoeEncoderDecoder',
        backbone=dict(type='ResNet', depth=18),
        decode_head=dict(type='FCNHead', in_channels=512, channels=8, num_classes=4),
    )
    with pytest.raises(ValueError, match=r"backbone\.type='ResNet' .* 'TimmViT'"):
        MODELS.build(config)


def test_upernet_takes_several_levels() -> None:
    neck = dict(type='MultiLevelNeck', in_channels=[12, 12], out_channels=8, scales=[2, 1])
    head = dict(
        type='UPerHead', in_channels=[8, 8], in_index=[0, 1], pool_scales=(1, 2), channels=8,
        num_classes=4, norm_cfg=dict(type='BN'), dropout_ratio=0.0,
    )  # fmt: skip
    model = tiny_segmentor(backbone=dict(out_indices=(0, 1)), neck=neck, decode_head=head)
    total, _ = model.parse_losses(model(**training_batch(model), mode='loss'))
    total.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []


# what the configs of heads and necks leave to the backbone of width 12 with three heads
MASK = dict(type='SegmenterMaskTransformerHead', num_layers=1, num_classes=4)
LINEAR = dict(type='FCNHead', num_convs=0, concat_input=False, num_classes=4)
UPER = dict(type='UPerHead', in_index=[0, 1], pool_scales=(1, 2), num_classes=4)
NECK = dict(type='MultiLevelNeck', scales=[2, 1])
LEVELS = dict(out_indices=(0, 1))


def sizes(**config: Any) -> dict[str, Any]:
    model = tiny_segmentor(**config)
    names = ('in_channels', 'channels', 'embed_dims', 'num_heads', 'out_channels')
    parts = {'decode': model.decode_head}
    if model.with_neck:
        parts['neck'] = model.neck
    if model.with_auxiliary_head:
        parts['auxiliary'] = model.auxiliary_head
    return {
        f'{part}.{name}': getattr(module, name)
        for part, module in parts.items()
        for name in names
        if hasattr(module, name) and (part, name) != ('decode', 'out_channels')
    }


def test_the_decoder_has_the_width_and_heads_of_the_backbone() -> None:
    head = tiny_segmentor(decode_head=MASK).decode_head
    assert (head.in_channels, head.channels, head.cls_emb.shape[-1]) == (12, 12, 12)
    assert head.layers[0].attn.attn.num_heads == 3
    narrow = tiny_segmentor(decode_head=dict(MASK, embed_dims=8, num_heads=2)).decode_head
    assert (narrow.in_channels, narrow.cls_emb.shape[-1]) == (12, 8)
    assert narrow.layers[0].attn.attn.num_heads == 2


def test_a_linear_head_has_the_width_of_the_backbone() -> None:
    found = sizes(decode_head=LINEAR)
    assert found == {'decode.in_channels': 12, 'decode.channels': 12}


def test_neck_and_heads_of_several_levels_have_the_width_of_the_backbone() -> None:
    auxiliary = dict(type='FCNHead', in_index=1, channels=6, num_classes=4)
    config = dict(backbone=LEVELS, neck=NECK, auxiliary_head=auxiliary)
    assert sizes(**config, decode_head=dict(UPER, channels=5)) == {
        'neck.in_channels': [12, 12],
        'neck.out_channels': 12,
        'decode.in_channels': [12, 12],
        'decode.channels': 5,
        'auxiliary.in_channels': 12,
        'auxiliary.channels': 6,
        'auxiliary.out_channels': 4,
    }
    several = tiny_segmentor(**{**config, 'auxiliary_head': [auxiliary] * 2}, decode_head=UPER)
    assert [head.in_channels for head in several.auxiliary_head] == [12, 12]


def test_heads_behind_a_neck_have_its_width() -> None:
    found = sizes(backbone=LEVELS, neck=dict(NECK, out_channels=8), decode_head=UPER)
    assert found['neck.in_channels'] == [12, 12]
    assert (found['decode.in_channels'], found['decode.channels']) == ([8, 8], 8)


def test_auxiliary_heads_have_the_classes_of_the_decode_head() -> None:
    auxiliary = dict(type='FCNHead', channels=6)
    model = tiny_segmentor(auxiliary_head=auxiliary)
    assert model.auxiliary_head.num_classes == model.decode_head.num_classes == 4
    wrong = [auxiliary, dict(auxiliary, num_classes=5)]
    with pytest.raises(ValueError, match=r'^model\.auxiliary_head\.num_classes=5 .* 4, as'):
        tiny_segmentor(auxiliary_head=wrong)


def test_a_file_that_init_cfg_would_take_in_part_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    whole = tiny_segmentor()
    torch.save({'state_dict': whole.state_dict()}, path)
    model = tiny_segmentor(init_cfg=init_cfg)
    model.init_weights()
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=0)
    within = {f'in.{name}': value for name, value in whole.state_dict().items()}
    torch.save({'state_dict': within}, path)
    tiny_segmentor(init_cfg=[{**init_cfg, 'prefix': 'in.'}]).init_weights()
    # as a classification is saved
    state = {f'model.{name}': v for name, v in whole.backbone.model.state_dict().items()}
    torch.save({'state_dict': state}, path)
    message = r'model\.init_cfg\.checkpoint=.*a\.pth.* does not fit .*model\.backbone\.checkpoint'
    with pytest.raises(ValueError, match=message):
        tiny_segmentor(init_cfg=init_cfg).init_weights()


def test_there_are_no_cascades_of_heads() -> None:
    with pytest.raises(ValueError, match=r'^model\.decode_head=.* one head'):
        tiny_segmentor(decode_head=[dict(type='FCNHead', num_classes=4)] * 2)


def test_an_unknown_head_is_named() -> None:
    with pytest.raises(KeyError, match='NoHead is not in the mmseg::model registry'):
        tiny_segmentor(decode_head=dict(type='NoHead'))


def groups_by_name(model: Any, layer_decay: float, **kw: Any) -> dict[str, tuple[float, float]]:
    build = LayerDecayOptimWrapperConstructor(
        {'optimizer': {'type': 'AdamW', 'lr': 1.0, 'weight_decay': 0.3}},
        {'layer_decay': layer_decay, **kw},
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in build(model).optimizer.param_groups:
        for parameter in group['params']:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group['lr'], group['weight_decay'])
    assert found.keys() == set(names.values())
    return found


def test_learning_rates_shrink_by_layer() -> None:
    groups = groups_by_name(tiny_segmentor(), 0.5)
    rate = {name: lr for name, (lr, _) in groups.items()}
    # from the top: heads, norm and last block 1, then halved for each block and the embedding
    assert rate['decode_head.cls_emb'] == rate['backbone.model.norm.weight'] == 1.0
    assert rate['backbone.model.blocks.1.mlp.experts.fc1.weight'] == 1.0
    assert rate['backbone.model.blocks.0.attn.qkv.weight'] == 0.5
    assert rate['backbone.model.patch_embed.proj.weight'] == 0.25
    assert rate['backbone.model.pos_embed'] == 0.25


def test_no_weight_decay_is_that_of_timm() -> None:
    groups = groups_by_name(tiny_segmentor(), 0.5)
    decay = {name: value for name, (_, value) in groups.items()}
    assert decay['backbone.model.pos_embed'] == decay['backbone.model.cls_token'] == 0
    assert decay['backbone.model.blocks.1.mlp.experts.fc1.bias'] == 0
    assert decay['backbone.model.blocks.1.mlp.experts.fc1.weight'] == 0.3
    assert decay['decode_head.dec_proj.weight'] == 0.3


def test_custom_keys_come_on_top_of_the_rate_of_the_layer() -> None:
    keys = {'decode_head': {'lr_mult': 10.0}, 'blocks.0': {'lr_mult': 3.0, 'decay_mult': 2.0}}
    groups = groups_by_name(tiny_segmentor(), 0.5, custom_keys=keys)
    assert groups['decode_head.dec_proj.weight'] == (10.0, 0.3)
    assert groups['backbone.model.blocks.0.attn.qkv.weight'] == (3 * 0.5, 0.6)
    assert groups['backbone.model.blocks.0.attn.qkv.bias'] == (3 * 0.5, 0.0)
    assert groups['backbone.model.patch_embed.proj.weight'] == (0.25, 0.3)


@pytest.mark.parametrize('wrong', [None, {}, {'layer_decay': 0.0}, {'layer_decay': 1.5}])
def test_layer_decay_is_a_share(wrong: dict | None) -> None:
    with pytest.raises(ValueError, match=r'^paramwise_cfg\.layer_decay='):
        LayerDecayOptimWrapperConstructor({'optimizer': {'lr': 1.0}}, wrong)


def test_layer_decay_refuses_other_settings() -> None:
    wrong = {'layer_decay': 0.5, 'norm_decay_mult': 0.0}
    with pytest.raises(ValueError, match=r'norm_decay_mult=.* layer_decay and custom_keys'):
        LayerDecayOptimWrapperConstructor({'optimizer': {'lr': 1.0}}, wrong)


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_a_published_model_says_the_channels_of_its_images(channels: int) -> None:
    model = tiny_segmentor(backbone={'in_chans': channels})
    assert model.test_preprocessing(ConfigDict())['input_size'] == (channels, 32, 32)
