"""Weights whose source names its network: the same function, or one line of what is different."""

import logging
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import GluMlp
from timm.models import save_for_hf
from timm.models.vision_transformer import ResPostBlock
from timm.utils import CheckpointSaver

from vqmoe_vision.engine.checkpoint import start_from
from vqmoe_vision.engine.model import check_experts
from vqmoe_vision.models.compat import STATED, Network, compare, state_network
from vqmoe_vision.models.create import create_model
from vqmoe_vision.models.weights import network_of
from vqmoe_vision.moe import METHODS

from .. import cases, refused
from ..variants import trials
from . import conftest
from .conftest import DENSE, DINOV3, SHALLOW, TINY, dense, distance, folder_of, make, shaken

AS_EVA = dict(pos_embed='none', reg_tokens=4, no_embed_class=True, init_values=1e-5, qkv_bias=False)
AS_GATED = dict(mlp_layer=GluMlp, act_layer='silu', mlp_ratio=2 * 2.66667, init_values=1e-5)
OF_SIGLIP = dict(class_token=False, global_pool='avg')


# Of timm: a name and options, options of the model that has the same tensors, and what is told.
@cases(
    'name, options, target, told',
    (DINOV3, {}, AS_EVA, 'rotary positions=RotaryEmbeddingDinoV3'),
    ('vit_base_patch16_rpn_224', OF_SIGLIP, OF_SIGLIP, 'block_fn=ResPostBlock'),
    (DENSE, dict(attn_layer='diff', num_heads=4), {}, 'attn_layer=DiffAttention'),
    (DENSE, dict(norm_layer='rmsnorm'), dict(norm_layer='simplenorm'), 'norm_layer=RmsNorm'),
    (conftest.GATED, {}, AS_GATED, 'gate=first'),
)
def test_another_function_is_refused(name, options, target, told, tmp_path):
    folder = folder_of(tmp_path, dense(name, **options), **options)
    for start in (
        lambda: make('smoe', upcycle=f'local-dir:{folder}', **target),
        lambda: start_from(make('smoe', **target), f'{folder}/model.safetensors'),
    ):
        refused(f'of {name} .* saved with .*{told}.*, the model has ', start)


@cases(
    'name, options',
    (DENSE, dict(num_heads=4, attn_layer='diff', act_layer='relu')),
    (DENSE, dict(act_layer='gelu')),  # another class of the same function
    ('vit_base_patch16_rpn_224', dict(block_fn=ResPostBlock, qkv_bias=False, **OF_SIGLIP)),
    ('vit_base_patch16_siglip_224', dict(class_token=False, global_pool='map')),
    ('vit_base_patch16_siglip_gap_224', dict(fc_norm=False, **OF_SIGLIP)),
)
def test_the_same_function_answers_alike(name, options, tmp_path, images):
    saved = {k: v for k, v in options.items() if k != 'block_fn'}
    source = dense(name, **saved)
    folder = folder_of(tmp_path, source, **saved)
    model: Any = make('smoe', upcycle=f'local-dir:{folder}', renormalize=True, **options).eval()
    torch.testing.assert_close(model(images), source(images), rtol=1e-5, atol=1e-5)
    assert 'head.weight' in model.weights_report.loaded


def of_run(model: Any, path: Path, stated: Any = None) -> str:
    """A checkpoint as a run leaves it, which states its network, or what is given."""
    meta = {STATED: stated or state_network(model)}
    torch.save({'state_dict': model.state_dict(), 'meta': meta}, path)
    return str(path)


@pytest.mark.parametrize('way', ['bare', 'folder', 'run'])
@cases(
    'options, target, hint',
    (dict(class_token=False, global_pool='map'), OF_SIGLIP, "global_pool='map'"),
    (dict(global_pool='avg'), {}, "global_pool='avg'"),
    (dict(fc_norm=False, **OF_SIGLIP), OF_SIGLIP, 'fc_norm=False'),
)
def test_a_head_behind_another_pooling_starts_anew(options, target, hint, way, tmp_path, caplog):
    source = dense(**options)
    if way == 'folder':
        upcycle = f'local-dir:{folder_of(tmp_path, source, **options)}'
    else:
        upcycle = of_run(source, tmp_path / 'a.pth', 7 if way == 'bare' else None)
    with caplog.at_level(logging.WARNING, 'vqmoe_vision'):
        model: Any = make('smoe', upcycle=upcycle, **target)
    assert {'head.weight', 'head.bias'} < set(model.weights_report.initialised)
    assert distance(model.head.weight, source.head.weight) > 0.5
    (line,) = caplog.messages
    assert 'the head is a fresh one, ' in line
    assert ('its features are pooled otherwise' if way == 'bare' else hint) in line
    caplog.clear()
    make('smoe', upcycle=upcycle, num_classes=3, **target)
    assert not caplog.messages


def test_a_head_that_is_loaded_with_all_else_is_fed_as_it_was(tmp_path):
    """By `checkpoint_path` and `load_from`, which take all of the weights or none."""
    path = of_run(dense(global_pool='max'), tmp_path / 'a.pth')
    other = {**TINY, 'global_pool': 'avg'}
    for build in (
        lambda: create_model(DENSE, checkpoint_path=path, **other),
        lambda: check_experts(create_model(DENSE, **other), path),
    ):
        refused(r"global_pool='max', the model has global_pool='avg'", build)
    create_model(DENSE, checkpoint_path=path, **{**TINY, 'global_pool': 'max'})


def test_a_bare_file_with_rotary_positions_is_refused(tmp_path):
    path = str(tmp_path / 'a.pth')
    torch.save(dense(DINOV3).state_dict(), path)
    refused(r'names of an Eva .* rotary', make, 'smoe', upcycle=path, **AS_EVA)


def test_rotary_positions_beside_absolute_ones_are_suspected(tmp_path):
    path, name = str(tmp_path / 'a.pth'), 'vit_pe_core_tiny_patch16_384'
    state = dense(name).state_dict()
    refused(r'unexpected keys: norm_pre', conftest.fit_state, make('smoe'), state, path)
    told = 'whose positions are rotary too; names do not tell it from a VisionTransformer'
    # the arguments of timm's script say the method alone
    for said in ({}, {'args': Namespace(model='vit_tiny_smoe')}):
        torch.save({'state_dict': state, **said}, path)
        model: Any = make('smoe', upcycle=path, pre_norm=True)
        assert told in model.weights_report.warnings[0]
    given = dict(pretrained=True, pretrained_cfg_overlay={'file': path})
    assert not create_model(name, None, **TINY, **given).weights_report.warnings
    more = dict(pre_norm=True, global_pool='map')
    folder = folder_of(tmp_path, dense(**more), **more)
    named: Any = make('smoe', upcycle=f'local-dir:{folder}', **more)
    assert not named.weights_report.warnings


EVA02 = dict(patch_size=8, swiglu_mlp=False, scale_mlp=False, qkv_fused=True)


@cases(
    'name, given, options',
    (DINOV3, dict(rope_temperature=100.0), dict(rope_temperature=50.0)),
    (DINOV3, dict(rope_rotate_half=True), dict(rope_rotate_half=False)),
    (DINOV3, dict(rope_grid_offset=0.5), dict(rope_grid_offset=0.0)),
    (DINOV3, dict(rope_grid_indexing='xy'), dict(rope_grid_indexing='ij')),
    ('eva02_tiny_patch14_224', dict(ref_feat_shape=(16, 16)), dict(ref_feat_shape=(2, 2))),
)
def test_other_rotary_positions_are_refused(name, given, options, tmp_path):
    shape = EVA02 if name != DINOV3 else {}
    folder = folder_of(tmp_path, dense(name, **shape, **given), **shape, **given)
    place = dict(pretrained=True, pretrained_cfg_overlay={'file': f'{folder}/model.safetensors'})
    arguments: dict[str, Any] = {**TINY, **shape, **given, **place}
    (option, before), after = *given.items(), *options.values()
    message = f'{option}={before!r}, the model has {option}={after!r}'
    refused(re.escape(message), create_model, name, **{**arguments, **options})
    # images of another size have other positions of the same kind
    model: Any = create_model(name, {'method': 'smoe'}, **{**arguments, 'img_size': 48})
    assert 'head.weight' in model.weights_report.loaded


SPARSE, BY_ITSELF = 'test_vit_vqmoe', 'test_vit_dense'


@cases('name, moe', (BY_ITSELF, None), (BY_ITSELF, {'method': 'smoe'}), (SPARSE, None))
@pytest.mark.parametrize('tag', [None, 'cifar10'])
def test_weights_by_name_are_compared_with_the_network_of_the_name(name, moe, tag):
    given: dict[str, Any] = dict(pretrained=True, pretrained_cfg=tag)
    known = re.escape(f'{name}.cifar10' if tag else name)
    for options, told in (
        (dict(num_heads=4), 'num_heads=3, the model has num_heads=4'),
        (dict(act_layer='relu'), 'act_layer=gelu, the model has act_layer=relu$'),
    ):
        refused(f'of {known} .* {told}', create_model, name, moe, **given, **options)
    model: Any = create_model(name, moe, **given)
    assert 'head.weight' in model.weights_report.loaded


@pytest.mark.parametrize('moe', [None, {'method': 'smoe'}])
def test_weights_in_the_place_of_those_of_a_name_are_not_said_to_be_its(moe, tmp_path):
    theirs = timm.create_model(BY_ITSELF, num_heads=4)
    save_for_hf(theirs, tmp_path / 'L', model_args={'num_heads': 4}, safe_serialization=True)
    file = tmp_path / 'L/model.safetensors'
    for overlay in ({'file': str(file)}, {'state_dict': theirs.state_dict()}):
        given: Any = dict(pretrained=True, pretrained_cfg_overlay=overlay)
        model: Any = create_model(BY_ITSELF, moe, **given, num_heads=4)
        assert 'head.weight' in model.weights_report.loaded
        if 'file' in overlay:
            message = r'of test_vit_dense .* num_heads=4, .* num_heads=3'
            refused(message, create_model, BY_ITSELF, moe, **given)
        else:  # bare tensors say nothing
            create_model(BY_ITSELF, moe, **given)


# as a training of each method and form has them
FORMS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in METHODS}
FORMS |= {form: ('vqmoe', {'form': form}) for form in ('discrete', 'continuous')}
OPTIONS = {
    f'{name}-{option}={value!r}': (name, {option: value})
    for name, method in METHODS.items()
    for options in (*method.config.PRESETS.values(), *trials(method.config).values())
    for option, value in options.items()
}


@pytest.fixture(scope='module')
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('saved')
    for form, (method, options) in FORMS.items():
        model = make(method, **SHALLOW, **options)
        save_for_hf(model, root / form, safe_serialization=True)
    return root


@pytest.mark.parametrize('ours', FORMS)
def test_experts_of_another_method_are_refused(ours, folders):
    method, options = FORMS[ours]
    model = make(method, **SHALLOW, **options)
    others = {form: name for form, (name, _) in FORMS.items() if name != method}
    for form, name in others.items():
        message = f"saved with method='{name}', the model has method='{method}'"
        refused(message, start_from, model, f'{folders}/{form}/model.safetensors')
    refused(message, make, method, upcycle=f'local-dir:{folders}/{form}', **SHALLOW, **options)


@pytest.mark.parametrize('way', ['checkpoint', 'checkpoint_path', 'upcycle'])
def test_a_run_says_it_as_values(way, tmp_path):
    source = make('smoe', renormalize=True)
    path = of_run(source, tmp_path / 'a.pth')
    found, own = network_of(path), Network.of(source)
    assert found is not None
    assert (found.facts, found.options, found.img_size) == (own.facts, own.options, own.img_size)

    def load(method: str) -> None:
        if way == 'checkpoint':
            start_from(make(method), path)
        else:
            create_model(f'vit_tiny_{method}', **TINY, **{way: path})

    load('smoe')
    refused("method='smoe', the model", load, 'ecmoe')


@cases('stated', 7, {'method': None, 'options': None}, {'method': 'tomorrows'}, {'method': [1]})
def test_what_says_nothing_is_not_refused(stated, tmp_path):
    path = of_run(make('smoe'), tmp_path / 'a.pth', stated)
    model: Any = create_model('vit_tiny_ecmoe', **TINY, upcycle=path)
    assert not model.weights_report.warnings


@pytest.mark.parametrize('case', OPTIONS)
def test_an_option_is_told_if_answers_follow_it(case, images):
    method, options = OPTIONS[case]
    source = shaken(make(method, depth=2))
    try:
        model: Any = make(method, depth=2, **options).eval()
        model.load_state_dict(source.state_dict())
    except (ValueError, RuntimeError):  # not alone, or tensors show it
        return
    with torch.no_grad():
        changed = distance(model(images), source(images)) > 1e-5
    (name,) = options
    lines = compare(model, Network.of(source), 'a')
    by_tensors = name == 'form'  # the full form's are those of the discrete one and more
    assert bool(lines) == (changed and not by_tensors)
    if lines:
        (line,) = lines
        before, after = (getattr(x.moe_config, name) for x in (source, model))
        assert f'trained with {name}={before!r}, the model has {name}={after!r}' in line


def left_by_timm(model: Any, folder: Path, name: str, **others: Any) -> str:
    """What timm's train.py leaves, with the arguments that it was called with."""
    args, optimizer = Namespace(lr=0.1, model=name, **others), torch.optim.SGD([torch.ones(1)])
    CheckpointSaver(model, optimizer, args, checkpoint_dir=folder).save_checkpoint(0, metric=1.0)
    return str(folder / 'last.pth.tar')


@pytest.mark.parametrize('theirs', METHODS)
def test_a_checkpoint_of_timms_script_says_its_method(theirs, tmp_path):
    """By the arguments that the script was called with."""
    ours = 'ecmoe' if theirs == 'smoe' else 'smoe'  # of the same tensors, where any two are
    arguments = {'model_kwargs': {'num_experts': 4}}
    path = left_by_timm(make(theirs, num_experts=4), tmp_path, f'vit_tiny_{theirs}', **arguments)
    message = f"method='{theirs}', the model has method='{ours}'"
    refused(message, make, ours, num_experts=4, upcycle=path)
    again: Any = make(theirs, num_experts=4, upcycle=path)
    assert again.weights_report.warnings == () and not again.weights_report.initialised
