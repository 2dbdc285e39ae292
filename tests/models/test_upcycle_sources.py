"""Networks, names, files and folders that dense weights come from, and what is read in them."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.config import ConfigDict
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.models import save_for_hf

from vqmoe_vision.engine.record import starting_weights
from vqmoe_vision.engine.trained import weights_normalization
from vqmoe_vision.models.create import create_model

from .conftest import DENSE, TINY, dense, make


def test_a_folder_of_timm_brings_its_normalisation(tmp_path: Path, images: torch.Tensor) -> None:
    source = dense('deit_tiny_patch16_224')  # of mean 0.485, ours says 0.5
    save_for_hf(source, tmp_path / 'deit', safe_serialization=True)
    model: Any = make('smoe', upcycle=f'local-dir:{tmp_path / "deit"}', renormalize=True).eval()
    torch.testing.assert_close(model(images), source(images))
    assert model.pretrained_cfg['mean'][0] == pytest.approx(0.485)
    assert model.pretrained_cfg['architecture'] == 'vit_tiny_smoe'


@pytest.mark.parametrize('name', ['a.ckpt', 'A.PTH', 'a.Pt'])
@pytest.mark.parametrize('form', [Path, str, '~'])
def test_a_file_is_known_by_all_its_usual_names(
    form: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    source, path = dense(), tmp_path / name
    torch.save(source.state_dict(), path)
    given = f'~/{name}' if form == '~' else form(path)
    model: Any = make('smoe', upcycle=given)
    assert torch.equal(model.head.weight, source.head.weight)
    assert model.pretrained_cfg['file'] == str(path)
    # whoever follows the source of a run's weights finds the file too
    assert weights_normalization(model, None, {'upcycle': given}) is None
    if form != Path:
        found = starting_weights(ConfigDict(upcycle=given))
        assert found == starting_weights(ConfigDict(upcycle=str(path))) and found


def test_a_name_with_a_tag_says_where_the_weights_are(
    saved: tuple[Any, str], images: torch.Tensor
) -> None:
    source, path = saved  # in the place of the hub, which tests do not reach
    name = 'deit_tiny_patch16_224.fb_in1k'
    overlay = {'file': path}
    model: Any = make('smoe', upcycle=name, pretrained_cfg_overlay=overlay, renormalize=True)
    torch.testing.assert_close(model.eval()(images), source(images))
    assert model.pretrained_cfg['std'][0] == pytest.approx(0.229)
    assert model.pretrained_cfg['architecture'] == 'vit_tiny_smoe'


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('vit_tiny_patch16_224', dict(init_values=0.1)),
        ('vit_tiny_patch16_224', dict(reg_tokens=2, no_embed_class=True, init_values=0.1)),
        ('vit_tiny_patch16_224', dict(class_token=False, global_pool='avg')),
        ('vit_tiny_patch16_224', dict(qk_norm=True, pre_norm=True, proj_bias=False)),
        ('deit3_small_patch16_224', dict(no_embed_class=True, init_values=0.1)),
    ],
)
def test_other_networks_start_the_same_ones_and_no_others(
    name: str, options: dict[str, Any], tmp_path: Path, images: torch.Tensor
) -> None:
    source, path = dense(name, **options), str(tmp_path / 'a.safetensors')
    save_file(source.state_dict(), path)
    model = make('smoe', upcycle=path, renormalize=True, **options).eval()
    torch.testing.assert_close(model(images), source(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match='does not fit the model: '):
        make('smoe', upcycle=path)
    with pytest.raises(ValueError, match='does not fit the model: '):
        plain = dense()
        torch.save(plain.state_dict(), tmp_path / 'plain.pth')
        make('smoe', upcycle=str(tmp_path / 'plain.pth'), **options)


def test_names_of_deit3s_own_files_are_understood(images: torch.Tensor) -> None:
    source = dense(init_values=0.1)
    state = {
        name.replace('ls1.gamma', 'gamma_1').replace('ls2.gamma', 'gamma_2'): value
        for name, value in source.state_dict().items()
    }
    config = {'state_dict': {'model': state}}
    options = dict(init_values=1e-5, renormalize=True, pretrained_cfg_overlay=config)
    model = make('smoe', pretrained=True, **options).eval()
    torch.testing.assert_close(model(images), source(images), rtol=1e-5, atol=1e-5)


def test_dinov2s_own_files_with_registers_are_understood(images: torch.Tensor) -> None:
    options = dict(reg_tokens=2, no_embed_class=True, init_values=0.1, num_classes=0)
    source = dense(**options)
    state = source.state_dict()
    # there the class token has a position too, and timm adds the two
    of_class = torch.randn(1, 1, 32)
    state['cls_token'] = state['cls_token'] - of_class
    state['pos_embed'] = torch.cat([of_class, state['pos_embed']], dim=1)
    state['register_tokens'] = state.pop('reg_token')
    state['mask_token'] = torch.zeros(1, 32)
    config = {'state_dict': state}
    model: Any = make(
        'smoe', pretrained=True, pretrained_cfg_overlay=config, **options, renormalize=True
    )
    torch.testing.assert_close(model.eval()(images), source(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('theirs', ['reg_token', 'register_tokens'])
def test_registers_that_only_one_has_are_named(theirs: str, tmp_path: Path) -> None:
    state = dense(reg_tokens=2, no_embed_class=True).state_dict()
    state[theirs] = state.pop('reg_token')
    if theirs == 'register_tokens':  # DINOv2's, where the class token has a position
        state['pos_embed'] = torch.cat([torch.zeros(1, 1, 32), state['pos_embed']], dim=1)
        state['mask_token'] = torch.zeros(1, 32)
    path, plain = str(tmp_path / 'a.pth'), str(tmp_path / 'plain.pth')
    torch.save(state, path)
    with pytest.raises(ValueError, match='unexpected keys: reg_token'):
        make('smoe', upcycle=path)
    with pytest.raises(ValueError, match='no_embed_class=False'):
        make('smoe', upcycle=path, reg_tokens=2)
    torch.save(dense(no_embed_class=True).state_dict(), plain)
    with pytest.raises(ValueError, match='missing keys: reg_token'):
        make('smoe', upcycle=plain, reg_tokens=2, no_embed_class=True)


def test_a_head_behind_a_layer_that_timm_has_not_starts_anew(tmp_path: Path) -> None:
    state = dense().state_dict()
    state['pre_logits.fc.weight'] = torch.eye(32)
    path = str(tmp_path / 'a.pth')
    torch.save(state, path)
    report = make('smoe', upcycle=path).weights_report
    (line,) = report.warnings
    assert line.endswith('stands behind pre_logits.fc.weight, which timm has not')
    assert {'pre_logits.fc.weight', 'head.weight', 'head.bias'} == set(report.outside)


def test_a_backbone_may_end_early_and_nothing_else(tmp_path: Path) -> None:
    path = str(tmp_path / 'a.pth')
    torch.save(dense(init_values=0.1).state_dict(), path)
    backbone = dict(num_classes=0, global_pool='', depth=2)
    with pytest.raises(ValueError, match=r'unexpected keys: blocks\.0\.ls1\.gamma'):
        make('smoe', upcycle=path, **backbone)
    model: Any = make('smoe', upcycle=path, init_values=0.1, **backbone)
    assert 'blocks.2.mlp.fc1.weight' in model.weights_report.unused


IMPOSSIBLE = [
    (dict(mean=[127.5] * 3, std=[127.5] * 3), r'mean=\[127.5.* from 0 to 1, what a white pixel is'),
    (dict(mean=[0.5] * 3, std=[0.0] * 3), r'std=\[0.0, 0.0, 0.0\] is not possible: above 0'),
    (dict(mean=[0.5] * 3, std=[float('inf')] * 3), r'std=\[inf.* is not possible: from 0 to 1'),
    (dict(mean=[float('nan')] * 3, std=[0.5] * 3), r'mean=\[nan.* is not possible: from 0 to 1'),
    (
        dict(mean='x', std=[0.5] * 3),
        "mean='x' is not possible: one number, or one for each channel",
    ),
    (dict(mean=[0.5] * 2, std=[0.5] * 3), r'mean=\[0.5, 0.5\] is not possible: one number, or one'),
    (
        dict(mean=0.5, std=True),
        'std=True is not possible: one number, or one for each channel of 3',
    ),
]


@pytest.mark.parametrize(('numbers', 'message'), IMPOSSIBLE)
@pytest.mark.parametrize('way', ['upcycle', 'pretrained', 'dense', 'config', 'host'])
def test_numbers_that_no_images_have_are_refused(
    numbers: dict[str, Any], message: str, way: str, saved: tuple[Any, str]
) -> None:
    overlay = dict(pretrained_cfg_overlay=numbers)
    named = dict(pretrained=True, pretrained_cfg_overlay={'file': saved[1], **numbers})
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        'upcycle': ('vit_tiny_smoe', dict(upcycle=saved[1], **overlay)),
        'pretrained': ('vit_tiny_smoe', named),
        'dense': (DENSE, named),
        'config': ('vit_tiny_smoe', dict(upcycle=saved[1], pretrained_cfg=numbers)),
        'host': ('moe_host', dict(host=DENSE, method='smoe', **named)),
    }
    name, given = calls[way]
    create = create_model if way == 'dense' else timm.create_model
    field = 'pretrained_cfg.' if way == 'config' else 'pretrained_cfg_overlay.'
    with pytest.raises(ValueError, match=rf'^{field}{message}'):
        create(name, **TINY, **given)


@pytest.mark.parametrize(('numbers', 'message'), IMPOSSIBLE)
def test_a_config_beside_weights_with_such_numbers_is_refused(
    numbers: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_for_hf(dense(), tmp_path, model_args=TINY, safe_serialization=True)
    file = tmp_path / 'config.json'
    content = json.loads(file.read_text())
    content['pretrained_cfg'].update(numbers)
    file.write_text(json.dumps(content))
    message = message.replace('std=True', 'std=(True|1)')
    with pytest.raises(ValueError, match=rf'config\.json.: {message}'):
        make('smoe', upcycle=f'local-dir:{tmp_path}')


@pytest.mark.parametrize('numbers', [(0.25, 0.5), ([0.25], [0.5]), ((0.25,) * 3, [0.5] * 3)])
def test_one_number_is_that_of_each_channel(numbers: Any, saved: tuple[Any, str]) -> None:
    mean, std = numbers
    overlay = dict(pretrained_cfg_overlay=dict(mean=mean, std=std))
    model: Any = make('smoe', upcycle=saved[1], **overlay)
    found = resolve_model_data_config(model)
    assert (found['mean'], found['std']) == ((0.25,) * 3, (0.5,) * 3)
