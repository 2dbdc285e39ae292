"""Weights whose source names its network: the same function, or one line of what is different."""

import inspect
import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import LayerNorm
from timm.models import save_for_hf
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock

from vqmoe_vision.engine.checkpoint import start_from
from vqmoe_vision.models.create import create_model

from .conftest import TINY, dense, distance, make

DINOV3 = dict(pos_embed='none', reg_tokens=4, no_embed_class=True, init_values=1e-5, qkv_bias=False)
OF_SIGLIP = dict(class_token=False, global_pool='avg')


def folder_of(path: Path, name: str, **options: Any) -> tuple[Any, str]:
    """A dense model, and its folder."""
    model = dense(name, **options)
    save_for_hf(model, path / 'L', model_args={**TINY, **options}, safe_serialization=True)
    return model, str(path / 'L')


@pytest.mark.parametrize('way', ['local-dir', 'file', 'pretrained'])
@pytest.mark.parametrize(
    ('name', 'options', 'target', 'theirs', 'ours'),
    [
        (
            'vit_small_patch16_dinov3',
            {},
            DINOV3,
            ['rotary positions=RotaryEmbeddingDinoV3', 'model=Eva'],
            ['rotary positions=none', 'model=VisionTransformer'],
        ),
        (
            'vit_base_patch16_rpn_224',
            OF_SIGLIP,
            OF_SIGLIP,
            ['block_fn=ResPostBlock'],
            ['block_fn=Block'],
        ),
        ('vit_tiny_patch16_224', dict(num_heads=4), {}, ['num_heads=4'], ['num_heads=2']),
        ('vit_tiny_patch16_224', dict(act_layer='relu'), {}, ['act_layer=relu'], ['=gelu']),
        (
            'vit_base_patch32_clip_quickgelu_224',
            {},
            dict(pre_norm=True),
            ['act_layer=quick_gelu', 'eps=1e-05'],
            ['act_layer=gelu', 'eps=1e-06'],
        ),
        (
            'vit_tiny_patch16_224',
            dict(attn_layer='diff', num_heads=4),
            {},
            ['attn_layer=DiffAttention', 'num_heads=4'],
            ['attn_layer=Attention', 'num_heads=2'],
        ),
        (
            'vit_tiny_patch16_224',
            dict(norm_layer='rmsnorm'),
            dict(norm_layer='simplenorm'),
            ['norm_layer=RmsNorm'],
            ['norm_layer=SimpleNorm'],
        ),
    ],
)
def test_another_function_is_refused(
    name: str, options: dict[str, Any], target: dict[str, Any], theirs: list[str],
    ours: list[str], way: str, tmp_path: Path,
) -> None:  # fmt: skip
    _, folder = folder_of(tmp_path, name, **options)
    place: dict[str, Any] = {'upcycle': f'local-dir:{folder}'}
    if way == 'file':
        place = {'upcycle': f'{folder}/model.safetensors'}
    elif way == 'pretrained':
        overlay = {'file': f'{folder}/model.safetensors'}
        place = {'pretrained': True, 'pretrained_cfg_overlay': overlay}
    with pytest.raises(ValueError, match=f'of {name} does not fit the model: ') as caught:
        make('smoe', **place, **target)
    saved, found, model = str(caught.value).partition(', the model has ')
    assert found and all(fact in saved for fact in theirs) and all(fact in model for fact in ours)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('vit_tiny_patch16_224', dict(num_heads=4)),
        ('vit_tiny_patch16_224', dict(attn_layer='diff')),
        ('vit_tiny_patch16_224', dict(act_layer='relu')),
        ('vit_tiny_patch16_224', dict(act_layer='gelu')),  # another class of the same function
        ('vit_base_patch16_rpn_224', dict(block_fn=ResPostBlock, qkv_bias=False, **OF_SIGLIP)),
        ('vit_base_patch16_siglip_224', dict(class_token=False, global_pool='map')),
        ('vit_base_patch16_siglip_gap_224', dict(fc_norm=False, **OF_SIGLIP)),
    ],
)
def test_the_same_function_answers_alike(
    name: str, options: dict[str, Any], tmp_path: Path, images: torch.Tensor
) -> None:
    saved = {k: v for k, v in options.items() if k != 'block_fn'}
    source, folder = folder_of(tmp_path, name, **saved)
    model: Any = make('smoe', upcycle=f'local-dir:{folder}', renormalize=True, **options).eval()
    torch.testing.assert_close(model(images), source(images), rtol=1e-5, atol=1e-5)
    assert 'head.weight' in model.weights_report.loaded


@pytest.mark.parametrize('bare', [True, False])
@pytest.mark.parametrize(
    ('name', 'options', 'target', 'hint'),
    [
        (
            'vit_base_patch16_siglip_224',
            dict(class_token=False, global_pool='map'),
            OF_SIGLIP,
            "global_pool='map'",
        ),
        ('vit_tiny_patch16_224', dict(global_pool='avg'), {}, "global_pool='avg'"),
        ('vit_tiny_patch16_224', {}, dict(global_pool='avg'), "global_pool='token'"),
        (
            'vit_base_patch16_siglip_gap_224',
            dict(fc_norm=False, **OF_SIGLIP),
            OF_SIGLIP,
            'fc_norm=False',
        ),
    ],
)
def test_a_head_behind_another_pooling_starts_anew(
    name: str, options: dict[str, Any], target: dict[str, Any], hint: str, bare: bool,
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    source, folder = folder_of(tmp_path, name, **options)
    upcycle = f'local-dir:{folder}'
    if bare:
        upcycle = str(tmp_path / 'bare.safetensors')
        save_file(source.state_dict(), upcycle)
        hint = 'its features are pooled otherwise'
    with caplog.at_level(logging.WARNING, 'vqmoe_vision'):
        model: Any = make('smoe', upcycle=upcycle, **target)
    report = model.weights_report
    assert {'head.weight', 'head.bias'} < set(report.initialised)
    assert distance(model.head.weight, source.head.weight) > 0.5
    (line,) = caplog.messages
    assert 'the head is a fresh one, ' in line and hint in line
    # whoever asks for other classes knows
    caplog.clear()
    make('smoe', upcycle=upcycle, num_classes=3, **target)
    assert not caplog.messages


def test_pooling_that_names_of_tensors_do_not_tell(tmp_path: Path) -> None:
    _, folder = folder_of(tmp_path, 'vit_tiny_patch16_224', global_pool='max')
    model: Any = make('smoe', upcycle=f'local-dir:{folder}', global_pool='avg')
    assert "global_pool='max', the model has global_pool='avg'" in model.weights_report.remarks[0]


@pytest.mark.parametrize('options', [{}, DINOV3])
def test_a_bare_file_with_rotary_positions_is_not_said_to_have_none(
    options: dict[str, Any], tmp_path: Path
) -> None:
    path = str(tmp_path / 'a.pth')
    torch.save(dense('vit_small_patch16_dinov3').state_dict(), path)
    with pytest.raises(ValueError, match=r'names of an Eva .* rotary') as caught:
        make('smoe', upcycle=path, **options)
    assert 'pos_embed' not in str(caught.value)


@pytest.mark.parametrize('name', ['vit_pe_core_tiny_patch16_384', 'vit_pe_core_base_patch16_224'])
def test_rotary_positions_beside_absolute_ones_are_suspected(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / 'a.pth')
    torch.save(dense(name).state_dict(), path)
    with pytest.raises(ValueError, match=r'unexpected keys: norm_pre') as caught:
        make('smoe', upcycle=path)
    assert '\n' not in str(caught.value)
    with caplog.at_level(logging.WARNING, 'vqmoe_vision'):
        model: Any = make('smoe', upcycle=path, pre_norm=True)
    told = 'whose positions are rotary too; names do not tell it from a VisionTransformer'
    assert told in caplog.messages[0] and told in model.weights_report.warnings[0]
    # an Eva has them
    given = dict(pretrained=True, pretrained_cfg_overlay={'file': path})
    model = create_model(name, {'method': 'smoe'}, **TINY, **given)
    assert not model.weights_report.warnings


@pytest.mark.parametrize('bare', [True, False])
def test_what_names_its_network_is_not_suspected(bare: bool, tmp_path: Path) -> None:
    given = dict(pre_norm=True, global_pool='map')
    source, folder = folder_of(tmp_path, 'vit_tiny_patch16_224', **given)
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    upcycle = str(tmp_path / 'a.pth') if bare else f'local-dir:{folder}'
    model: Any = make('smoe', upcycle=upcycle, **given)
    assert bool(model.weights_report.warnings) == bare


EVA02 = dict(patch_size=8, swiglu_mlp=False, scale_mlp=False, qkv_fused=True)


@pytest.mark.parametrize('moe', [None, {'method': 'smoe'}])
@pytest.mark.parametrize(
    ('name', 'given', 'options', 'message'),
    [
        (
            'vit_small_patch16_dinov3',
            {},
            dict(rope_temperature=50.0),
            'rope_temperature=100.0, the model has rope_temperature=50.0',
        ),
        (
            'vit_small_patch16_dinov3',
            {},
            dict(rope_rotate_half=False),
            'rope_rotate_half=True, the model has rope_rotate_half=False',
        ),
        (
            'vit_small_patch16_dinov3',
            dict(rope_grid_offset=0.5, rope_grid_indexing='xy'),
            dict(rope_grid_offset=0.0, rope_grid_indexing='ij'),
            "rope_grid_offset=0.5, rope_grid_indexing='xy', the model has rope_grid_offset=0.0",
        ),
        (
            'eva02_tiny_patch14_224',
            EVA02,
            dict(ref_feat_shape=(2, 2)),
            'ref_feat_shape=(16, 16), the model has ref_feat_shape=(2, 2)',
        ),
        (
            'vit_small_patch16_dinov3',
            {},
            dict(rope_type='cat'),
            'rotary positions=RotaryEmbeddingDinoV3',
        ),
        (
            'vit_small_patch16_dinov3',
            {},
            dict(use_rot_pos_emb=False),
            'rotary positions=RotaryEmbeddingDinoV3, the model has rotary positions=none',
        ),
    ],
)
def test_other_rotary_positions_are_refused(
    name: str, given: dict[str, Any], options: dict[str, Any], message: str, moe: dict | None,
    tmp_path: Path,
) -> None:  # fmt: skip
    _, folder = folder_of(tmp_path, name, **given)
    place = dict(pretrained=True, pretrained_cfg_overlay={'file': f'{folder}/model.safetensors'})
    arguments: dict[str, Any] = {**TINY, **given, **place}
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model(name, moe, **{**arguments, **options})
    # images of another size have other positions of the same kind
    model: Any = create_model(name, moe, **{**arguments, 'img_size': 48})
    assert 'head.weight' in model.weights_report.loaded


@pytest.mark.skipif(
    'rope_mrope_section' not in inspect.signature(Eva).parameters, reason='this timm has no MRoPE'
)
def test_sections_of_rotary_positions_that_were_saved_as_a_list(tmp_path: Path) -> None:
    given = dict(rope_type='mrope', rope_mrope_section=(2, 3, 3))
    name = 'vit_small_patch16_dinov3'
    _, folder = folder_of(tmp_path, name, **given)
    place = dict(pretrained=True, pretrained_cfg_overlay={'file': f'{folder}/model.safetensors'})
    model: Any = create_model(name, **TINY, **given, **place)
    assert 'head.weight' in model.weights_report.loaded
    with pytest.raises(ValueError, match=re.escape('rope_mrope_section=(2, 3, 3), the model')):
        create_model(name, **TINY, **{**given, 'rope_mrope_section': (4, 2, 2)}, **place)


@pytest.mark.parametrize(
    'name',
    [
        'vit_pwee_patch16_reg1_gap_256',
        'vit_dpwee_patch16_reg1_gap_256',
        'vit_small_patch16_18x2_224',
    ],
)
def test_blocks_that_do_several_things_side_by_side_are_compared(name: str, tmp_path: Path) -> None:
    _, folder = folder_of(tmp_path, name)
    given: dict[str, Any] = dict(
        TINY, pretrained=True, pretrained_cfg_overlay={'file': f'{folder}/model.safetensors'}
    )
    model: Any = create_model(name, **given)
    assert 'head.weight' in model.weights_report.loaded
    for options, message in (
        (dict(num_heads=4), 'num_heads=2, the model has num_heads=4$'),
        (dict(act_layer='relu'), 'act_layer=gelu, the model has act_layer=relu$'),
        (dict(norm_layer=partial(LayerNorm, eps=1e-3)), 'eps=1e-06, the model has eps=0.001$'),
    ):
        with pytest.raises(ValueError, match=message):
            create_model(name, **{**given, **options})


def test_a_checkpoint_of_a_run_is_compared_too(tmp_path: Path) -> None:
    _, folder = folder_of(tmp_path, 'vit_tiny_patch16_224', num_heads=4)
    with pytest.raises(ValueError, match='num_heads=4, the model has num_heads=2'):
        start_from(make('smoe'), f'{folder}/model.safetensors')


def test_an_architecture_of_a_later_timm_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, folder = folder_of(tmp_path, 'vit_tiny_patch16_224')
    config = Path(folder) / 'config.json'
    config.write_text(config.read_text().replace('"vit_tiny_patch16_224"', '"vit_of_tomorrow"'))
    make('smoe', upcycle=f'local-dir:{folder}')
    assert "'vit_of_tomorrow', which this timm does not know" in caplog.text
    assert timm.is_model('vit_tiny_patch16_224') and source is not None
