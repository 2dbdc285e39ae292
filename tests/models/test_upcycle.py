"""Dense weights in, experts out, through timm's loading: the same answers, all of it reported."""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from mmengine.config import ConfigDict
from safetensors.torch import save_file
from timm.layers import GluMlp, SwiGLU

from vqmoe_vision.engine.checkpoint import start_from
from vqmoe_vision.engine.model import weights_normalization
from vqmoe_vision.engine.record import starting_weights
from vqmoe_vision.models.create import create_model
from vqmoe_vision.models.upcycle import Upcycling, upcycle
from vqmoe_vision.moe.experts import Experts

from .. import cases, refused
from .conftest import DENSE, EXACT, TINY, check_complete, dense, folder_of, make, shaken


@pytest.mark.parametrize('method, options', EXACT)
def test_a_model_begins_with_the_answers_of_the_dense_one(method, options, saved, images):
    source, path = saved
    model: Any = make(method, upcycle=path, **options).eval()
    torch.testing.assert_close(model(images), source(images), rtol=1e-5, atol=1e-5)
    report = model.weights_report
    check_complete(report, model, source.state_dict())
    assert 'head.weight' in report.loaded and report.outside == report.unused == ()


def test_a_head_of_other_classes_starts_anew_and_nothing_else_may(saved):
    source, path = saved
    model: Any = make('smoe', upcycle=path, num_classes=3)
    report = model.weights_report
    assert {'head.weight', 'head.bias'} < set(report.initialised)
    assert report.outside == ('head.weight', 'head.bias')
    assert report.copied['blocks.1.mlp.experts.fc1.bias'] == 'blocks.1.mlp.fc1.bias'
    check_complete(report, model, source.state_dict())
    assert 'the head is a fresh one, shapes: head.weight is (10, 32)' in report.remarks[0]
    state = source.state_dict()
    del state['blocks.2.attn.proj.weight']  # timm, no longer strict, would not mind
    torch.save(state, path)
    refused(r'missing keys: blocks\.2\.attn\.proj', make, 'smoe', upcycle=path, num_classes=3)


def test_other_sizes_of_image_patch_and_channels_are_timms(saved):
    overlay = {'file': saved[1], 'num_classes': 10, 'custom_load': False}
    options: dict[str, Any] = dict(img_size=48, patch_size=16, in_chans=1)
    options |= dict(pretrained=True, pretrained_cfg_overlay=overlay)
    timms = timm.create_model(DENSE, **{**TINY, **options}).eval()
    model: Any = make('smoe', **options, renormalize=True).eval()
    images = torch.randn(2, 1, 48, 48)
    torch.testing.assert_close(model(images), timms(images), rtol=1e-5, atol=1e-5)
    assert model.weights_report.resized == {
        'pos_embed': ((1, 17, 32), (1, 10, 32)),
        'patch_embed.proj.weight': ((32, 3, 8, 8), (32, 1, 16, 16)),
    }


def test_options_of_upcycling_need_dense_weights(tmp_path):
    path, how = str(tmp_path / 'a.pth'), {'upcycling': {'noise': 0.1}}
    torch.save(make('smoe').state_dict(), path)
    builds: list[Any] = [
        lambda **how: make('smoe', **how),
        lambda **how: create_model(DENSE, {'method': 'smoe'}, **TINY, **how),
        lambda **how: create_model('vit_tiny_smoe', checkpoint_path=path, **TINY, **how),
    ]
    for build in (*builds, lambda **how: make('smoe', upcycle=path, **how)):
        refused(r'upcycling=.*noise=0\.1.* no dense', build, **how)
    for build in builds:
        build(upcycling={'noise': 0.0, 'split': False})


def mlp_of(width: int = 8, hidden: int = 32) -> Any:
    return shaken(timm.layers.Mlp(width, hidden))


def made(mlp: Any, hidden: int, number: int = 4, **options: Any) -> dict[str, torch.Tensor]:
    experts = Experts(number, mlp.fc1.in_features, hidden)
    return upcycle(mlp.state_dict(), experts, Upcycling(**options), 'mlp')


def test_noise_is_relative_to_the_weights():
    mlp = mlp_of(32, 128)
    weights = made(mlp, 128, noise=0.1)
    for layer in ('fc1', 'fc2'):
        original = getattr(mlp, layer).weight
        change = weights[f'{layer}.weight'] - original
        assert (change.std() / original.std()).item() == pytest.approx(0.1, rel=0.05)
        assert not torch.equal(change[0], change[1])
        assert torch.equal(weights[f'{layer}.bias'][0], getattr(mlp, layer).bias)


def test_answers_that_are_added_are_shares_of_the_dense_one():
    # two shared experts beside the chosen ones: three answers, each a third
    mlp, images = mlp_of(8, 32), torch.randn(5, 8)
    made = upcycle(mlp.state_dict(), Experts(4, 8, 32), Upcycling(), 'mlp', summands=3)
    for expert in range(4):
        one = {name: value[expert] for name, value in made.items()}
        found = torch.func.functional_call(mlp, one, (images,))
        torch.testing.assert_close(3 * found, mlp(images))


# 4 / 3 of a width, and 4,304 of 1,152 as a SigLIP has: six digits of either make one unit fewer
@pytest.mark.parametrize('width, hidden', [(12, 16), (192, 256), (1152, 4304), (832, 960)])
def test_the_ratio_that_is_told_fits(width, hidden):
    state, experts = mlp_of(width, hidden).state_dict(), Experts(1, width, 8)
    said = refused('expert_mlp_ratio=', upcycle, state, experts, Upcycling(), 'an MLP')
    (told,) = re.findall(r'expert_mlp_ratio=([0-9.]+) fits', said)
    assert int(width * float(told)) == hidden


def test_dropped_units_are_drawn_like_those_they_replace():
    mlp = mlp_of(64, 256)
    with torch.no_grad():
        mlp.fc2.weight.add_(3)
    weights = made(mlp, 256, drop=0.25)
    for expert in range(4):
        same = (weights['fc1.weight'][expert] == mlp.fc1.weight).all(dim=1)
        assert same.sum() == 192  # three quarters of 256
        # a unit is dropped whole: its row, its bias and its column
        assert torch.equal(same, weights['fc1.bias'][expert] == mlp.fc1.bias)
        columns = (weights['fc2.weight'][expert] == mlp.fc2.weight).all(dim=0)
        assert torch.equal(same, columns)
        drawn = weights['fc2.weight'][expert][:, ~same]
        assert drawn.mean().item() == pytest.approx(3, abs=0.05)
        expected = mlp.fc2.weight[:, ~same].std().item()
        assert drawn.std().item() == pytest.approx(expected, rel=0.1)
    assert not torch.equal(weights['fc1.weight'][0], weights['fc1.weight'][1])


def test_experts_that_split_an_mlp_answer_as_it_does_together():
    mlp = mlp_of()
    with torch.no_grad():
        mlp.fc2.bias.zero_()
    # 4 experts of 16 units take each of the 32 twice; F / H = 2, so that their mean is the MLP
    weights = made(mlp, 16, split=True)
    x = torch.randn(5, 8)
    hidden = torch.einsum('td,ehd->eth', x, weights['fc1.weight']) + weights['fc1.bias'][:, None]
    answers = torch.einsum('eth,edh->etd', mlp.act(hidden), weights['fc2.weight'])
    torch.testing.assert_close(answers.mean(dim=0), mlp(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(weights['fc1.weight'][0], weights['fc1.weight'][2])  # shuffled anew


@pytest.mark.parametrize('gate, kind', [('last', GluMlp), ('separate', SwiGLU)])
def test_units_of_a_gated_mlp_stay_with_their_gates(gate, kind):
    mlp = shaken(kind(8, 64 if gate == 'last' else 32, norm_layer=torch.nn.LayerNorm))
    eps, names = mlp.norm.eps, ('fc1',) if gate == 'last' else ('fc1_g', 'fc1_x')

    def made_of(hidden: int, **how: Any) -> tuple[Experts, list[torch.Tensor]]:
        experts = Experts(4, 8, hidden, type(mlp.act), gate=gate, norm_eps=eps)
        experts.load_state_dict(upcycle(mlp.state_dict(), experts, Upcycling(**how), 'mlp'))
        halves = [half for name in names for half in getattr(experts, name).weight.split(hidden, 1)]
        return experts, [*halves, experts.fc2.weight.mT]

    theirs = [h for name in names for h in getattr(mlp, name).weight.split(32)] + [mlp.fc2.weight.T]
    # a quarter of 32 units is drawn anew, with both rows and the column
    for parts in zip(*made_of(32, drop=0.25)[1], strict=True):
        same = [(part == own).all(dim=1) for part, own in zip(parts, theirs, strict=True)]
        assert same[0].sum() == 24 and all(torch.equal(same[0], other) for other in same)
    # 4 experts of 16 units take each of the 32 twice; what a column is times F / H = 2
    experts, parts = made_of(16, split=True)
    columns = parts[-1].flatten(0, 1) / 2
    units = (columns[:, None] == theirs[-1]).all(dim=2).int().argmax(dim=1)
    assert sorted(units.tolist()) == sorted([*range(32)] * 2)
    for part, own in zip(parts[:-1], theirs, strict=False):
        assert torch.equal(part.flatten(0, 1), own[units])
    assert torch.equal(experts.norm.weight.flatten(), mlp.norm.weight[units])


def test_experts_that_cannot_have_all_units_are_refused(saved):
    options: dict[str, Any] = dict(expert_mlp_ratio=1.0, upcycling={'split': True})
    make('smoe', upcycle=saved[1], num_experts=4, **options)  # of 32 units each
    message = r'upcycling\.split=True .* 2 experts of 32 .* 128 units'
    refused(message, make, 'smoe', upcycle=saved[1], num_experts=2, **options)


@pytest.mark.parametrize('form, name', [(Path, 'a.ckpt'), (str, 'A.PTH'), ('~', 'a.Pt')])
def test_a_file_is_known_by_all_its_usual_names(form, name, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    source, path = dense(), tmp_path / name
    torch.save(source.state_dict(), path)
    given = f'~/{name}' if form == '~' else form(path)
    model: Any = make('smoe', upcycle=given)
    assert torch.equal(model.head.weight, source.head.weight)
    assert model.pretrained_cfg['file'] == str(path)
    assert weights_normalization(model, None, {'upcycle': given}) is None
    if form != Path:
        found = starting_weights(ConfigDict(upcycle=given))
        assert found == starting_weights(ConfigDict(upcycle=str(path))) and found


@cases(
    'name, options',
    (DENSE, dict(class_token=False, global_pool='avg')),
    (DENSE, dict(qk_norm=True, pre_norm=True, proj_bias=False)),
    ('deit3_small_patch16_224', dict(no_embed_class=True, init_values=0.1)),
)
def test_other_networks_start_the_same_ones_and_no_others(name, options, saved, tmp_path, images):
    source, path = dense(name, **options), str(tmp_path / 'a.safetensors')
    save_file(source.state_dict(), path)
    model = make('smoe', upcycle=path, renormalize=True, **options).eval()
    torch.testing.assert_close(model(images), source(images), rtol=1e-5, atol=1e-5)
    for file, given in ((path, {}), (saved[1], options)):
        refused('does not fit the model: ', make, 'smoe', upcycle=file, **given)


def test_dinov2s_own_files_with_registers_are_understood(images):
    options = dict(reg_tokens=2, no_embed_class=True, init_values=0.1, num_classes=0)
    source = dense(**options)
    # there the class token has a position too, and timm adds the two
    state, of_class = source.state_dict(), torch.randn(1, 1, 32)
    state['cls_token'] = state['cls_token'] - of_class
    state['pos_embed'] = torch.cat([of_class, state['pos_embed']], dim=1)
    state['register_tokens'] = state.pop('reg_token')
    state['mask_token'] = torch.zeros(1, 32)
    given = dict(pretrained=True, pretrained_cfg_overlay={'state_dict': state}, renormalize=True)
    model: Any = make('smoe', **given, **options)
    torch.testing.assert_close(model.eval()(images), source(images), rtol=1e-5, atol=1e-5)


def test_numbers_that_no_images_have_are_refused(saved, tmp_path):
    """Others in tests/classification/test_normalization.py."""
    file, numbers = folder_of(tmp_path, dense()) / 'config.json', dict(mean=0.5, std=[0.0] * 3)
    content = json.loads(file.read_text())
    content['pretrained_cfg'].update(numbers)
    file.write_text(json.dumps(content))
    named = dict(pretrained=True, pretrained_cfg_overlay={'file': saved[1], **numbers})
    for place, build in {
        'pretrained_cfg_overlay.': lambda: create_model(DENSE, **TINY, **named),
        'pretrained_cfg.': lambda: make('smoe', upcycle=saved[1], pretrained_cfg=numbers),
        ".*config.json': ": lambda: make('smoe', upcycle=f'local-dir:{tmp_path}/L'),
    }.items():
        refused(f'^{place}std=.* is not possible', build)


@cases('part, shape', ('fc2.bias', (1,)), ('fc2.weight', (64, 128)), ('fc1.weight', ()))
def test_an_mlp_of_parts_that_do_not_fit_leaves_the_model_as_it_is(part, shape, saved):
    state = saved[0].state_dict()
    state[f'blocks.1.mlp.{part}'] = torch.zeros(shape)
    torch.save(state, saved[1])
    model = make('smoe')
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refused(r'blocks\.1\.mlp.*is no MLP ', start_from, model, saved[1])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@cases(
    'source, message',
    ('resnet50', "upcycle='resnet50' is not possible: a VisionTransformer of timm"),
    ('vit_smal_patch16_224', 'did you mean vit_small_patch16_224'),
    ('vit_tiny_smoe', 'a name that has weights'),
    ('local-dir:nowhere', 'a folder with the config.json'),
    ('nowhere.pth', "checkpoint 'nowhere.pth' does not exist"),
    (3, 'upcycle=3'),
    ('https://x.y/z.pth', "upcycle='https://x.y/z.pth' is not possible"),
)
def test_a_source_that_is_none_is_named(source, message):
    refused(message, make, 'smoe', upcycle=source)


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    for source in ('hf-hub:timm/deit_tiny_patch16_224', 'deit_tiny_patch16_224.fb_in1k'):
        message = r"weights of '.*timm/deit_tiny_patch16_224.*' cannot be read: .*connection"
        assert refused(message, make, 'smoe', upcycle=source, cache_dir=str(tmp_path)).endswith(
            '; a file of them needs no network: upcycle=FILE, in a config model.pretrained=False '
            'model.checkpoint=FILE'
        )


@pytest.mark.parametrize('source', ['dense', 'smoe'])
@pytest.mark.parametrize('missing', [(3,), (1, 3)])
def test_a_layer_without_mlp_and_experts_is_refused(source, missing, tmp_path):
    path = str(tmp_path / 'a.pth')
    layers = tuple(f'blocks.{block}.mlp.' for block in missing)
    whole = (dense() if source == 'dense' else make('smoe')).state_dict()
    torch.save({k: v for k, v in whole.items() if not k.startswith(layers)}, path)
    message = rf'neither an MLP nor experts for blocks\.{missing[0]}\.mlp, '
    refused(message, make, 'smoe', upcycle=path)
    model = make('smoe')
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refused(message, start_from, model, path)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_an_activation_that_has_learned_is_copied(tmp_path, images):
    source, path = dense(act_layer='prelu'), str(tmp_path / 'a.pth')
    torch.save(source.state_dict(), path)
    options: dict[str, Any] = dict(act_layer='prelu', renormalize=True)
    model = make('smoe', upcycle=path, **options).eval()
    torch.testing.assert_close(model(images), source(images))
    name = 'blocks.1.mlp.experts.act.weight'
    assert model.weights_report.copied[name] == 'blocks.1.mlp.act.weight'
    drawn = make('smoe', upcycle=path, upcycling=dict(drop=0.5, noise=0.1), **options)
    assert torch.equal(drawn.state_dict()[name], source.blocks[1].mlp.act.weight)
    state = source.state_dict() | {'blocks.1.mlp.act.weight': torch.zeros(128)}
    torch.save(state, path)
    refused(r"'act\.weight': \(128,\)", make, 'smoe', upcycle=path, **options)
