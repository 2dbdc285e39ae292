"""Dense weights that cannot become experts, or cannot be read, are named in one line."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked

from vqmoe_vision.contrib.int8 import experts_as_linear
from vqmoe_vision.engine.checkpoint import start_from

from .conftest import dense, make


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


def test_experts_that_are_linear_layers_already_are_not_made_of_mlps(
    method: str, saved: tuple[Any, str]
) -> None:
    model = experts_as_linear(make(method))
    message = r'cannot become experts, .* load its weights before experts_as_linear\(model\)$'
    with pytest.raises(ValueError, match=message):
        start_from(model, saved[1])


def gated(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The MLPs of DINOv2's largest model."""
    return {k.replace('fc1', 'w12').replace('fc2', 'w3'): v for k, v in state.items()}


@pytest.mark.parametrize(
    ('change', 'options', 'message'),
    [
        ({}, dict(depth=6), r'missing keys: blocks\.4\.norm1'),
        ({}, dict(depth=2), r'unexpected keys: blocks\.2\.norm1'),
        ({}, dict(embed_dim=64), r'shapes: cls_token is \(1, 1, 32\), the model has'),
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
    for state in (packed.state_dict(), gated(packed.state_dict())):
        torch.save(state, path)
        with pytest.raises(ValueError, match=r'does not fit the model: .*blocks\.0\.mlp'):
            make('smoe', upcycle=path)
        with pytest.raises(ValueError, match=r'blocks\.0\.mlp of .*(is no MLP|cannot become)'):
            make('smoe', upcycle=path, moe_layers=[0, 1, 2, 3])


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('resnet50', "upcycle='resnet50' is not possible: one of timm's VisionTransformers"),
        ('vit_smal_patch16_224', 'did you mean vit_small_patch16_224'),
        ('vit_tiny_smoe', 'a name that has weights'),
        ('local-dir:nowhere', 'a folder with the config.json'),
        ('nowhere.pth', "checkpoint 'nowhere.pth' does not exist"),
        (3, 'a timm model name'),
        ('https://x.y/z.pth', "='https://x.y/z.pth' is not possible: a timm model name"),
        ('vit_small_patch16_dinov3.lvd1689m', "one of timm's VisionTransformers"),
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
        assert str(caught.value).endswith(
            '; a file of them needs no network: upcycle=FILE, in a config model.pretrained=False '
            'model.checkpoint=FILE'
        )


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


@pytest.mark.parametrize('source', ['dense', 'smoe'])
@pytest.mark.parametrize('missing', [(3,), (1, 3)])
def test_a_layer_without_mlp_and_experts_is_refused(
    source: str, missing: tuple[int, ...], tmp_path: Path
) -> None:
    path = str(tmp_path / 'a.pth')
    layers = tuple(f'blocks.{block}.mlp.' for block in missing)
    whole = (dense() if source == 'dense' else make('smoe')).state_dict()
    torch.save({k: v for k, v in whole.items() if not k.startswith(layers)}, path)
    message = rf'neither an MLP nor experts for blocks\.{missing[0]}\.mlp, '
    with pytest.raises(ValueError, match=message):
        make('smoe', upcycle=path)
    model = make('smoe')
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        start_from(model, path)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_another_methods_checkpoint_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / 'a.pth')
    torch.save(make('smoe').state_dict(), path)
    with pytest.raises(ValueError, match=r'unexpected keys: .*router'):
        make('softmoe', upcycle=path)


def test_dense_weights_are_refused_where_timm_loads_them_as_they_are(
    saved: tuple[Any, str], method: str
) -> None:
    model = make(method)
    with pytest.raises(RuntimeError, match=r'blocks\.1\.mlp\.experts\.fc1\.weight'):
        make(method, checkpoint_path=saved[1])
    make(method, upcycle=saved[1])
    found = model.load_state_dict(saved[0].state_dict(), strict=False)
    assert 'blocks.1.mlp.experts.fc1.weight' in found.missing_keys
    assert 'blocks.1.mlp.fc1.weight' in found.unexpected_keys


def test_an_activation_that_has_learned_is_copied(tmp_path: Path, images: torch.Tensor) -> None:
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
    with pytest.raises(ValueError, match=r'act\.weight is \(128,\), and what their activation lea'):
        make('smoe', upcycle=path, **options)
