"""Models that travel: what timm's `save_for_hf` writes builds the same model, bit for bit."""

import json
import os
import re
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from vqmoe_vision.models import convert_to_moe, export
from vqmoe_vision.models.create import create_model
from vqmoe_vision.moe import METHODS

from .. import cases, refused
from ..variants import VARIANTS
from .conftest import DENSE, DINOV3, MORE, SHALLOW, TINY, check_complete, dense, make, pairs

PREPROCESSING: dict[str, Any] = dict(input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3))
PREPROCESSING |= dict(std=(0.4, 0.5, 0.6), crop_pct=0.8)
PREPROCESSING |= dict(crop_mode='squash', interpolation='bilinear')


def same(model: nn.Module, again: nn.Module, images: Tensor) -> None:
    state, found = model.state_dict(), again.state_dict()
    assert list(state) == list(found)
    torch.testing.assert_close(found, state, rtol=0, atol=0)
    torch.testing.assert_close(again.eval()(images), model.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_method_with_all_its_options(variant, tmp_path, images, train_step):
    method, options = VARIANTS[variant]
    model: Any = make(method, **SHALLOW, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # codebooks start, stages count
        train_step(model, optimizer, images, torch.arange(4))
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert sorted(os.listdir(tmp_path)) == ['config.json', 'model.safetensors']
    again: Any = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert again.moe_config == model.moe_config
    same(model, again, images)
    again.train()  # and it goes on as the model would
    torch.manual_seed(1)
    loss = train_step(model, None, images, torch.arange(4))
    torch.manual_seed(1)
    torch.testing.assert_close(train_step(again, None, images, torch.arange(4)), loss)


@cases('given', {'preset': 'official', 'code_share': 0.3}, {'form': 'discrete'}, ids=str)
def test_a_folder_of_weights_names_every_option(given, tmp_path):
    model: Any = make('vqmoe', **given)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    saved = json.loads((tmp_path / 'config.json').read_text())['model_args']
    options = vars(model.moe_config)
    assert options.keys() - saved.keys() == model.moe_config.unused().keys()
    assert all(saved[name] == value for name, value in options.items() if name in saved)
    # a preset that the call names is not ignored
    load = partial(timm.create_model, f'local-dir:{tmp_path}', pretrained=True)
    refused(r'does not fit the model: .*codebook', load, preset='ema', form='full')


@cases('preset, said', ('ema', {}), ('ema', {'preset': 'matched'}), ('paper', {'preset': 'paper'}))
def test_a_folder_that_names_only_what_a_call_gave_has_the_presets_of_then(preset, said, tmp_path):
    model: Any = make('vqmoe', preset=preset, num_experts=3)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    content = json.loads((tmp_path / 'config.json').read_text())
    options = vars(model.moe_config).keys() - {'num_experts'}
    kept = {name: value for name, value in content['model_args'].items() if name not in options}
    (tmp_path / 'config.json').write_text(json.dumps(content | {'model_args': kept | said}))
    again: Any = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert again.moe_config == model.moe_config
    discrete: Any = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, form='discrete')
    assert discrete.moe_config.codebook == model.moe_config.codebook


# of options those of slots alone follow the size
SIZED = [v for v, (method, _) in VARIANTS.items() if v in METHODS or method == 'softmoe']


@cases(
    'variant, before, after',
    *((variant, {'img_size': (32, 64)}, {'img_size': 32}) for variant in SIZED),
    *((method, {'reg_tokens': 2}, {'patch_size': 4}) for method in METHODS),
)
def test_a_model_whose_images_have_another_size_by_now(variant, before, after, tmp_path):
    method, options = VARIANTS[variant]
    model: Any = make(method, depth=2, **options, **before)
    model.set_input_size(**after)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    same(model, again, torch.randn(2, 3, *model.patch_embed.img_size))


def test_what_a_folder_says(tmp_path):
    """Of these weights, and nothing of those that timm has under the same name."""
    model: Any = create_model('vit_tiny_patch16_224.augreg_in21k_ft_in1k', **TINY)
    names = [f'class {index}' for index in range(10)]
    export.save(model, tmp_path / 'out', PREPROCESSING, names, 'cc0-1.0')
    content = json.loads((tmp_path / 'out/config.json').read_text())
    assert content['architecture'] == 'vit_tiny_patch16_224'
    assert (content['num_classes'], content['label_names']) == (10, names)
    config = content['pretrained_cfg']
    assert {name: config[name] for name in PREPROCESSING} == json.loads(json.dumps(PREPROCESSING))
    assert config['license'] == 'cc0-1.0'
    about_others = {'tag', 'url', 'file', 'hf_hub_id', 'origin_url', 'paper_ids', 'notes', 'source'}
    assert not about_others & config.keys()
    again: Any = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    resolved = timm.data.resolve_model_data_config(again)
    assert json.dumps(resolved, sort_keys=True) == json.dumps(PREPROCESSING, sort_keys=True)
    assert again.pretrained_cfg['label_names'] == names


@cases(
    'name, given, problem',
    ('vit_tiny_smoe', {'top_k': 1}, 'its answers differ'),
    ('vit_tiny_smoe', {'depth': 3}, 'unexpected keys: blocks.3'),
    ('vit_tiny_patch16_224', {'depth': 3}, 'Unexpected key'),
)
def test_another_model_is_not_left_behind(name, given, problem, tmp_path):
    model: Any = create_model(name, **TINY)
    model._model_args = {**TINY, **given}
    message = f'^timm does not build the model again .*{problem}'
    refused(message, export.save, model, tmp_path / 'out', PREPROCESSING)


HOSTS = (DENSE, DINOV3)
ROWS: list[Any] = [None, {'method': 'smoe'}]


def by_name(state: dict[str, Any], moe: dict[str, Any] | None, host: str = DENSE, **kw: Any) -> Any:
    """A model by its name in timm, from weights in the place of the hub's."""
    given = {'pretrained': True, 'pretrained_cfg_overlay': {'state_dict': state}}
    return create_model(host, moe, **{**TINY, **given, **kw})


@pytest.mark.parametrize('classes', [10, 5])
@pytest.mark.parametrize('moe', ROWS)
@pytest.mark.parametrize('host', HOSTS)
def test_every_tensor_of_weights_by_name_is_reported(host, moe, classes):
    source = dense(host).state_dict()
    model = by_name(source, moe, host, num_classes=classes, img_size=64)
    report = model.weights_report
    check_complete(report, model, source)
    head = {'head.weight', 'head.bias'}
    assert head <= set(report.loaded if classes == 10 else report.initialised)
    assert set(report.outside) == (set() if classes == 10 else head)
    assert ('pos_embed' in report.resized) == ('pos_embed' in source)
    assert bool(report.copied) == (moe is not None)
    torch.testing.assert_close(model.norm.weight, source['norm.weight'], rtol=0, atol=0)


# files of authors: options of the model, our names by theirs, and what timm has no use for
SCALED = {'init_values': 0.1}
REGISTERS = SCALED | {'reg_tokens': 2, 'no_embed_class': True}
OF_DINOV3 = {'storage_tokens': 'reg_token', r'ls\1.gamma': r'gamma_(\d)'}
UNUSED = ('mask_token', 'rope_embed.periods', 'blocks.0.attn.qkv.bias')
THEIRS: dict[str, Any] = {
    'dinov2': (DENSE, SCALED, {}, ('mask_token',)),
    'deit3': (DENSE, SCALED, {r'gamma_\1': r'ls(\d)\.gamma'}, ()),
    'dinov2-registers': (DENSE, REGISTERS, {'register_tokens': 'reg_token'}, ('mask_token',)),
    'augreg': (DENSE, {'num_classes': 0}, {}, ('pre_logits.fc.weight',)),
    'dinov3': (DINOV3, {}, OF_DINOV3, UNUSED),
}


@pytest.mark.parametrize('moe', ROWS)
@pytest.mark.parametrize('host, options, names, extra', THEIRS.values(), ids=THEIRS)
def test_what_timms_filter_drops_is_reported(host, options, names, extra, moe):
    source = dense(host, **options).state_dict()
    state = {name: torch.ones(32) for name in extra} | source
    for theirs, ours in names.items():
        state = {re.sub(ours, theirs, name): value for name, value in state.items()}
    if 'register_tokens' in state:  # DINOv2's class token has a position
        state['pos_embed'] = torch.cat([torch.zeros(1, 1, 32), state['pos_embed']], dim=1)
    model = by_name(state, moe, host, **options)
    assert model.weights_report.unused == extra
    check_complete(model.weights_report, model, {**source, **dict.fromkeys(extra)})


TORN: dict[str, Any] = {
    r'missing keys: blocks\.3\.': lambda state: {n: state[n] for n in state if '.3.' not in n},
    r'unexpected keys: stages\.0\.': lambda state: {
        name.replace('blocks.', 'stages.'): value for name, value in state.items()
    },
    r'unexpected keys: blocks\.1\.mlp\.': lambda _: make('xmoe').state_dict(),
}


@pytest.mark.parametrize('classes', [10, 5, 0])  # timm is strict in none of the last two
@pytest.mark.parametrize('moe', ROWS)
@pytest.mark.parametrize('message', TORN)
def test_weights_by_name_are_not_half_loaded(message, moe, classes):
    state = TORN[message](dense().state_dict())
    refused(message, by_name, state, moe, num_classes=classes)


IN_TURN = zip(MORE, cycle(method for _, method in pairs(DINOV3)), strict=False)


@cases('host, method', *pairs(*HOSTS), *IN_TURN)
def test_a_converted_model_is_saved_as_it_is(host, method, tmp_path, images):
    model = dense(host)
    options = {'num_experts': 4, 'moe_layers': (0, 3), 'expert_mlp_ratio': 2.0}
    how = {'split': True, 'noise': 0.1}
    convert_to_moe(model, method, upcycling=how, **options)
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == 'moe_host'
    recorded = config['model_args']
    assert (recorded['host'], recorded['method'], recorded['depth']) == (host, method, 4)
    assert 'upcycling' not in recorded
    again: Any = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert (type(again), again.moe_config) == (type(model), model.moe_config)
    same(model, again, images)
    features = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True)
    features.eval()
    assert [tuple(part.shape) for part in features(images)] == [(4, 32, 4, 4)] * 3


def test_copies_of_frozen_parameters_are_frozen(method):
    model = dense().requires_grad_(False)
    model.blocks[3].mlp.requires_grad_(True)
    report = convert_to_moe(model, method)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {flags[name] for name in report.copied if name.startswith('blocks.1.')} == {False}
    assert {flags[name] for name in report.copied if name.startswith('blocks.3.')} == {True}
