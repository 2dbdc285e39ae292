"""Dense weights in, experts out: through timm's loading, and in a model that is already there."""

import json
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from timm.models import save_for_hf

from vqmoe_vision import collect_losses
from vqmoe_vision.engine.checkpoint import start_from
from vqmoe_vision.models import MoeVisionTransformer, convert_to_moe
from vqmoe_vision.models.create import create_model
from vqmoe_vision.models.state_dicts import Report
from vqmoe_vision.models.transfer import transfer
from vqmoe_vision.models.upcycle import Upcycling, upcycle
from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe.experts import Experts

from .conftest import TINY, make
from .test_saved import RECORDS

DENSE = 'vit_tiny_patch16_224'
EXACT = [
    pytest.param(name, options, id=f'{name}-{label}')
    for name, method in METHODS.items()
    for label, options in method.config.EXACT_UPCYCLING.items()
]


def shaken(model: Any) -> Any:
    """No tensor as any model starts with."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def dense(name: str = DENSE, **kwargs: Any) -> Any:
    return shaken(timm.create_model(name, **{**TINY, **kwargs}))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, str]:
    """A dense model, and its file."""
    model, path = dense(), tmp_path / 'dense.pth'
    torch.save(model.state_dict(), path)
    return model, str(path)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(('method', 'options'), EXACT)
def test_a_model_begins_with_the_answers_of_the_dense_one(
    method: str, options: dict[str, Any], saved: tuple[Any, str], images: torch.Tensor
) -> None:
    source, path = saved
    model = make(method, upcycle=path, **options).eval()
    torch.testing.assert_close(model(images), source(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('method', [n for n, m in METHODS.items() if not m.config.EXACT_UPCYCLING])
def test_a_method_without_options_for_it_does_not(
    method: str, saved: tuple[Any, str], images: torch.Tensor
) -> None:
    source, path = saved
    for preset in METHODS[method].config.PRESETS:
        model = make(method, upcycle=path, preset=preset).eval()
        assert distance(model(images), source(images)) > 0.01


def check_complete(report: Report, model: Any, source: dict[str, torch.Tensor]) -> None:
    """Each tensor of the model has one fate, and each of the checkpoint has one."""
    fates = [*report.loaded, *report.resized, *report.copied, *report.initialised]
    assert sorted(fates) == sorted(model.state_dict())
    # experts and what reads images may be copies of one tensor
    uses = {*report.loaded, *report.resized, *report.copied.values()}
    assert sorted([*uses, *report.unused, *report.outside]) == sorted(source)


def test_every_tensor_is_reported(saved: tuple[Any, str], method: str) -> None:
    source, path = saved
    model: Any = make(method, upcycle=path)
    report = model.weights_report
    check_complete(report, model, source.state_dict())
    assert report.copied['blocks.1.mlp.experts.fc1.bias'] == 'blocks.1.mlp.fc1.bias'
    assert 'head.weight' in report.loaded and report.outside == report.unused == ()
    line = next(line for line in report.lines() if line.startswith('made of dense MLPs: '))
    assert 'blocks.3.mlp.experts.fc2.weight' in line


def test_timms_own_way_is_the_same(saved: tuple[Any, str], images: torch.Tensor) -> None:
    source, path = saved
    options = dict(renormalize=True, pretrained_cfg_overlay={'file': path})
    model = make('smoe', pretrained=True, **options).eval()
    torch.testing.assert_close(model(images), source(images))


def test_a_head_of_other_classes_starts_anew_and_nothing_else_may(
    saved: tuple[Any, str], tmp_path: Path
) -> None:
    source, path = saved
    model: Any = make('smoe', upcycle=path, num_classes=3)
    report = model.weights_report
    assert {'head.weight', 'head.bias'} < set(report.initialised)
    assert report.outside == ('head.weight', 'head.bias')
    assert 'the head is a fresh one, shapes: head.weight is (10, 32)' in report.remarks[0]
    state = source.state_dict()
    del state['blocks.2.attn.proj.weight']  # timm, no longer strict, would not mind
    torch.save(state, tmp_path / 'torn.pth')
    with pytest.raises(ValueError, match=r'only the model has blocks\.2\.attn\.proj\.weight'):
        make('smoe', upcycle=str(tmp_path / 'torn.pth'), num_classes=3)


def test_a_head_is_kept_whatever_number_of_classes_the_configuration_has(
    saved: tuple[Any, str],
) -> None:
    source, path = saved  # of 10 classes, the entry point's configuration says 1000
    model: Any = make('smoe', upcycle=path)
    torch.testing.assert_close(model.head.weight, source.head.weight, rtol=0, atol=0)


def test_a_folder_of_timm_brings_its_normalisation(tmp_path: Path, images: torch.Tensor) -> None:
    source = dense('deit_tiny_patch16_224')  # of mean 0.485, ours says 0.5
    save_for_hf(source, tmp_path / 'deit', safe_serialization=True)
    model: Any = make('smoe', upcycle=f'local-dir:{tmp_path / "deit"}', renormalize=True).eval()
    torch.testing.assert_close(model(images), source(images))
    assert model.pretrained_cfg['mean'][0] == pytest.approx(0.485)
    assert model.pretrained_cfg['architecture'] == 'vit_tiny_smoe'


def test_a_name_with_a_tag_says_where_the_weights_are(
    saved: tuple[Any, str], images: torch.Tensor
) -> None:
    source, path = saved  # in the place of the hub, which tests do not reach
    name = 'deit_tiny_patch16_224.fb_in1k'
    overlay = {'file': path}
    model: Any = make('smoe', upcycle=name, pretrained_cfg_overlay=overlay, renormalize=True)
    torch.testing.assert_close(model.eval()(images), source(images))
    assert model.pretrained_cfg['hf_hub_id'] == 'timm/deit_tiny_patch16_224.fb_in1k'
    assert model.pretrained_cfg['std'][0] == pytest.approx(0.229)
    assert model.pretrained_cfg['architecture'] == 'vit_tiny_smoe'


def test_a_model_that_is_built_again_does_not_start_from_the_source_again(
    saved: tuple[Any, str], tmp_path: Path
) -> None:
    _, path = saved
    model: Any = make('smoe', upcycle=path, upcycling={'noise': 0.1}, num_experts=4)
    assert not {'upcycle', 'upcycling'} & model._model_args.keys()
    # timm before 1.0.31 does not record them
    save_for_hf(model, tmp_path / 'moe', model_args={**TINY, 'num_experts': 4})
    Path(path).unlink()
    again: Any = timm.create_model(f'local-dir:{tmp_path / "moe"}', pretrained=True)
    assert 'upcycle' not in json.loads((tmp_path / 'moe' / 'config.json').read_text())['model_args']
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


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
    with pytest.raises(
        ValueError, match=r'does not fit the model: .*(would fit|no_embed_class=\w+ is right)'
    ):
        make('smoe', upcycle=path)
    with pytest.raises(
        ValueError, match=r'does not fit the model: .*(would fit|no_embed_class=\w+ is right)'
    ):
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
    with pytest.raises(ValueError, match=r'only the checkpoint has reg_token; reg_tokens=2, no_em'):
        make('smoe', upcycle=path)
    said = {'reg_token': 'no_embed_class=True would fit', 'register_tokens': '=True would fit'}
    with pytest.raises(ValueError, match=said[theirs]):
        make('smoe', upcycle=path, reg_tokens=2)
    torch.save(dense(no_embed_class=True).state_dict(), plain)
    with pytest.raises(ValueError, match=r'only the model has reg_token; reg_tokens=0 would fit'):
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


@pytest.mark.parametrize(
    ('part', 'shape'),
    [('fc2.bias', (64,)), ('fc2.bias', (1,)), ('fc2.weight', (64, 128)), ('fc1.bias', (256,)),
     ('fc1.bias', (64,)), ('fc1.weight', ())],
)  # fmt: skip
def test_an_mlp_of_parts_that_do_not_fit_leaves_the_model_as_it_is(
    part: str, shape: tuple[int, ...], saved: tuple[Any, str]
) -> None:
    state = saved[0].state_dict()
    state[f'blocks.1.mlp.{part}'] = torch.zeros(shape)
    torch.save(state, saved[1])
    model = make('smoe')
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r'blocks\.1\.mlp.*is no MLP: its .*, beside fc1\.weight'):
        start_from(model, saved[1])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_backbone_may_end_early_and_nothing_else(tmp_path: Path) -> None:
    path = str(tmp_path / 'a.pth')
    torch.save(dense(init_values=0.1).state_dict(), path)
    backbone = dict(num_classes=0, global_pool='', depth=2)
    with pytest.raises(ValueError, match=r'blocks\.0\.ls1\.gamma.*; init_values=1e-5 would fit'):
        make('smoe', upcycle=path, **backbone)
    model: Any = make('smoe', upcycle=path, init_values=0.1, **backbone)
    assert 'blocks.2.mlp.fc1.weight' in model.weights_report.unused


def test_other_sizes_of_image_patch_and_channels_are_timms(
    saved: tuple[Any, str],
) -> None:
    _, path = saved
    options = dict(img_size=48, patch_size=16, in_chans=1)
    overlay = {'file': path, 'num_classes': 10, 'custom_load': False}
    arguments = {**TINY, **options, 'pretrained_cfg_overlay': overlay}
    timms = timm.create_model('vit_tiny_patch16_224', pretrained=True, **arguments).eval()
    options |= dict(pretrained=True, pretrained_cfg_overlay=overlay, renormalize=True)
    model: Any = make('smoe', **options).eval()
    images = torch.randn(2, 1, 48, 48)
    torch.testing.assert_close(model(images), timms(images), rtol=1e-5, atol=1e-5)
    resized = model.weights_report.resized
    assert resized == {
        'pos_embed': ((1, 17, 32), (1, 10, 32)),
        'patch_embed.proj.weight': ((32, 3, 8, 8), (32, 1, 16, 16)),
    }


def gated(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The MLPs of DINOv2's largest model."""
    return {k.replace('fc1', 'w12').replace('fc2', 'w3'): v for k, v in state.items()}


@pytest.mark.parametrize(
    ('change', 'options', 'message'),
    [
        ({}, dict(depth=6), r'only the model has blocks\.4\.norm1.*; depth=4 would fit'),
        ({}, dict(depth=2), r'only the checkpoint has blocks\.2\.norm1.*; depth=4 would fit'),
        ({}, dict(embed_dim=64), r'of another size: cls_token is \(1, 1, 32\), the model has'),
        (
            {},
            dict(expert_mlp_ratio=2.0),
            r'has 128 hidden units and experts 64: expert_mlp_ratio=4',
        ),
        ({}, dict(upcycling={'split': True}), r'upcycling.split=True is not possible: False'),
        ({}, dict(upcycling={'noize': 1}), r'upcycling.noize=1 is not .* options are noise, drop'),
        ({}, dict(upcycling={'drop': 2.0}), r'upcycling.drop=2.0 is not possible: from 0 to 1'),
        ({}, dict(pretrained=True), 'pretrained=True is not possible: False with upcycle='),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[str, Any], options: dict[str, Any], message: str, saved: tuple[Any, str]
) -> None:
    _, path = saved
    with pytest.raises(ValueError, match=message) as caught:
        make('smoe', upcycle=path, **options)
    assert '\n' not in str(caught.value)


def test_gated_mlps_are_refused(tmp_path: Path) -> None:
    packed = dense(mlp_layer=SwiGLUPacked)
    path = str(tmp_path / 'a.pth')
    for state, message in (
        (packed.state_dict(), r'blocks.0.mlp is a gated MLP \(SwiGLU\), fc1 gives 128 .* takes 64'),
        (gated(packed.state_dict()), r'only the checkpoint has blocks\.0\.mlp\.w12'),
    ):
        torch.save(state, path)
        with pytest.raises(ValueError, match=message):
            make('smoe', upcycle=path)
        with pytest.raises(ValueError, match=r'SwiGLU|blocks.1.mlp.w12|experts are of fc1'):
            make('smoe', upcycle=path, moe_layers=[0, 1, 2, 3])


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('resnet50', "upcycle='resnet50' is not possible: one of timm's VisionTransformers"),
        ('vit_smal_patch16_224', 'did you mean vit_small_patch16_224'),
        ('vit_tiny_smoe', 'a model with weights'),
        ('local-dir:nowhere', 'a folder with the config.json'),
        ('nowhere.pth', "checkpoint 'nowhere.pth' does not exist"),
        (3, 'a timm model name'),
    ],
)
def test_a_source_that_is_none_is_named(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make('smoe', upcycle=source)


def test_a_hub_that_cannot_be_reached_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    for source in ('hf-hub:timm/deit_tiny_patch16_224', 'deit_tiny_patch16_224.fb_in1k'):
        message = r"weights of '.*timm/deit_tiny_patch16_224.*' cannot be read: .*connection"
        with pytest.raises(ValueError, match=message) as caught:
            make('smoe', upcycle=source, cache_dir=str(tmp_path))
        assert '\n' not in str(caught.value)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('way', ['upcycle', 'pretrained'])
def test_damaged_files_are_named(suffix: str, way: str, tmp_path: Path) -> None:
    path = tmp_path / f'a{suffix}'
    state = dense().state_dict()
    if suffix == '.pth':
        torch.save(state, path)
    else:
        save_file(state, path)
    content = path.read_bytes()
    options: dict[str, Any] = {'upcycle': str(path)}
    if way == 'pretrained':
        options = {'pretrained': True, 'pretrained_cfg_overlay': {'file': str(path)}}
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r'a\.\w+. (is damaged|cannot be read)') as caught:
        make('smoe', **options)
    assert '\n' not in str(caught.value)
    if suffix == '.pth':  # torch would load it
        at = content.index(state['blocks.1.mlp.fc1.weight'].numpy().tobytes())
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ValueError, match='does not match its checksum'):
            make('smoe', **options)


def test_another_methods_checkpoint_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / 'a.pth')
    torch.save(make('smoe').state_dict(), path)
    with pytest.raises(ValueError, match=r'is of another MoE method: only it has .*router'):
        make('softmoe', upcycle=path)


def test_options_of_upcycling_need_a_dense_mlp(tmp_path: Path) -> None:
    path = str(tmp_path / 'a.pth')
    torch.save(make('smoe').state_dict(), path)
    with pytest.raises(ValueError, match='no dense MLP to make experts of'):
        make('smoe', upcycle=path, upcycling={'noise': 0.1})


@pytest.mark.parametrize('way', ['timm', 'name', 'host', 'moe_host', 'checkpoint_path'])
def test_options_of_upcycling_need_weights(way: str, tmp_path: Path) -> None:
    builds: dict[str, Any] = {
        'timm': lambda **how: make('smoe', **how),
        'name': lambda **how: create_model('vit_tiny_smoe', **TINY, **how),
        'host': lambda **how: create_model(DENSE, {'method': 'smoe'}, **TINY, **how),
        'moe_host': lambda **how: timm.create_model(
            'moe_host', host=DENSE, method='smoe', **TINY, **how
        ),
        'checkpoint_path': lambda **how: create_model(
            'vit_tiny_smoe', checkpoint_path=str(tmp_path / 'a.pth'), **TINY, **how
        ),
    }
    torch.save(make('smoe').state_dict(), tmp_path / 'a.pth')
    with pytest.raises(
        ValueError, match=r'upcycling=.*noise=0\.1.* no dense weights.*d=T'
    ) as caught:
        builds[way](upcycling={'noise': 0.1})
    said = 'would give it an effect'
    assert said in str(caught.value) and '\n' not in str(caught.value)
    assert ('upcycle=SOURCE' in str(caught.value)) == (way not in ('host', 'moe_host'))
    for defaults in (None, {}, {'noise': 0.0, 'split': False}, Upcycling()):
        builds[way](upcycling=defaults)


def test_a_folder_may_say_how_its_experts_were_made(saved: tuple[Any, str], tmp_path: Path) -> None:
    """As nothing of ours writes it: whoever saves a model may name all that it was given."""
    how = {'upcycling': {'noise': 0.1}}
    model = make('smoe', upcycle=saved[1], **how)
    folder = f'local-dir:{tmp_path / "moe"}'
    save_for_hf(model, tmp_path / 'moe', model_args={**TINY, **how}, safe_serialization=True)
    again = [make('smoe', upcycle=folder)]
    if RECORDS:
        again.append(timm.create_model(folder, pretrained=True))
        timm.create_model(folder)
    for found in again:
        torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)


def mlp_of(width: int = 8, hidden: int = 32) -> Any:
    return shaken(timm.layers.Mlp(width, hidden))


def made(mlp: Any, hidden: int, number: int = 4, **options: Any) -> dict[str, torch.Tensor]:
    experts = Experts(number, mlp.fc1.in_features, hidden)
    return upcycle(mlp.state_dict(), experts, Upcycling(**options), 'mlp')


def test_noise_is_relative_to_the_weights() -> None:
    mlp = mlp_of(32, 128)
    weights = made(mlp, 128, noise=0.1)
    for layer in ('fc1', 'fc2'):
        original = getattr(mlp, layer).weight
        change = weights[f'{layer}.weight'] - original
        assert (change.std() / original.std()).item() == pytest.approx(0.1, rel=0.05)
        assert not torch.equal(change[0], change[1])
        assert torch.equal(weights[f'{layer}.bias'][0], getattr(mlp, layer).bias)


def test_dropped_units_are_drawn_like_those_they_replace() -> None:
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


def test_experts_that_split_an_mlp_answer_as_it_does_together() -> None:
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


def test_split_experts_go_through_timm(saved: tuple[Any, str], images: torch.Tensor) -> None:
    _, path = saved
    options = dict(expert_mlp_ratio=1.0, upcycling={'split': True})
    model: Any = make('smoe', upcycle=path, **options).eval()
    assert model.blocks[1].mlp.experts.fc1.weight.shape == (8, 32, 32)
    assert model(images).isfinite().all()


def test_transfer_leaves_the_model_alone(method: str) -> None:
    model: Any = make(method)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = dense().state_dict()
    state, report = transfer(model, source, 'a', upcycling=Upcycling())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert state.keys() == {*report.loaded, *report.resized, *report.copied}


@pytest.mark.parametrize(('method', 'options'), EXACT)
def test_a_converted_model_is_one_of_ours(
    method: str, options: dict[str, Any], images: torch.Tensor
) -> None:
    model = dense()
    source = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(images)
    report = convert_to_moe(model, method, **options)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    check_complete(report, model, source)
    assert isinstance(model, MoeVisionTransformer)
    ours: Any = make(method, **options)
    assert ours.no_weight_decay() == model.no_weight_decay()
    ours.load_state_dict(model.state_dict())
    torch.testing.assert_close(ours.eval()(images), model(images))


def test_a_converted_model_trains_as_ours_under_checkpointing(
    method: str, images: torch.Tensor, train_step: Any
) -> None:
    converted, targets = dense(), torch.arange(4)
    converted.set_grad_checkpointing()
    convert_to_moe(converted, method)
    ours: Any = make(method)
    ours.load_state_dict(converted.state_dict())
    calls: list[Any] = []
    converted.blocks[1].norm1.register_forward_hook(lambda *args: calls.append(args))
    for model in (converted, ours):
        torch.manual_seed(0)  # of the router noise
        train_step(model, None, images, targets)
    assert len(calls) == 2  # in the forward pass, and again in the backward pass
    for name, parameter in converted.named_parameters():
        expected = ours.get_parameter(name).grad
        assert (parameter.grad is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def dinov3(name: str = 'vit_small_patch16_dinov3', **kwargs: Any) -> Any:
    """An `Eva`: rotary positions, registers, LayerScale."""
    return dense(name, **kwargs)


@pytest.mark.parametrize(('method', 'options'), EXACT)
def test_a_model_of_dinov3_is_converted(
    method: str, options: dict[str, Any], images: torch.Tensor
) -> None:
    if METHODS[method].read_patches is not None:
        with pytest.raises(ValueError, match=r"block='EvaBlock' is not possible: Block, for a"):
            convert_to_moe(dinov3(), method, **options)
        return
    model = dinov3()
    source = {name: value.clone() for name, value in model.state_dict().items()}
    undecayed = model.no_weight_decay()
    expected = model(images)
    report = convert_to_moe(model, method, **options)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    check_complete(report, model, source)
    biases = {n for n in model.state_dict() if n.endswith(('experts.fc1.bias', 'experts.fc2.bias'))}
    assert undecayed | biases <= model.no_weight_decay() <= {*model.state_dict(), *undecayed}
    assert f'{method}: ' in str(model)
    model.train()
    with collect_losses(model) as collected:
        (model(images).sum() + collected.total()).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if 'experts' in n)
    again = pickle.loads(pickle.dumps(model.eval()))
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize(
    ('build', 'options', 'message'),
    [
        (
            lambda: dinov3('eva02_tiny_patch14_224'),
            {},
            r"blocks.1.mlp='GluMlp' is not .* gated MLPs \(SwiGLU\)",
        ),
        (
            lambda: dense(mlp_layer=SwiGLUPacked),
            {},
            "blocks.1.mlp='GluMlp' is not possible: timm's",
        ),
        (lambda: dense(scale_mlp_norm=True), {}, 'without a norm between them'),
        (lambda: make('smoe'), {}, "model='MoeVisionTransformer' is not possible"),
        (
            lambda: torch.nn.Linear(2, 2),
            {},
            "model='Linear' is not possible: timm's VisionTransformer or Eva",
        ),
        (dense, dict(moe_layers=[7]), r'moe_layers=\[7\] is not possible'),
        (dense, dict(top_k=9), 'top_k=9 is not possible'),
        (dense, dict(expert_mlp_ratio=2.0), 'upcycling.split=True cuts it'),
    ],
)
def test_what_cannot_be_converted_stays_as_it_is(
    build: Any, options: dict[str, Any], message: str
) -> None:
    model = build()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        convert_to_moe(model, 'smoe', **options)
    assert [type(module) for module in model.modules()] == kinds


def test_an_option_that_a_method_has_not_is_named() -> None:
    with pytest.raises(TypeError, match="'slots_per_expert' is no option of smoe"):
        convert_to_moe(dense(), 'smoe', slots_per_expert=2)


def test_every_option_of_upcycling_is_off_by_default() -> None:
    assert not any(getattr(Upcycling(), field.name) for field in fields(Upcycling))
