"""Dense weights that cannot become experts, or cannot be read, are named in one line."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

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
    with pytest.raises(ValueError, match=r'blocks\.1\.mlp.*is no MLP '):
        start_from(model, saved[1])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('resnet50', "upcycle='resnet50' is not possible: a VisionTransformer of timm"),
        ('vit_smal_patch16_224', 'did you mean vit_small_patch16_224'),
        ('vit_tiny_smoe', 'a name that has weights'),
        ('local-dir:nowhere', 'a folder with the config.json'),
        ('nowhere.pth', "checkpoint 'nowhere.pth' does not exist"),
        (3, 'upcycle=3'),
        ('https://x.y/z.pth', "upcycle='https://x.y/z.pth' is not possible"),
        ('vit_small_patch16_dinov3.lvd1689m', 'a VisionTransformer of timm'),
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
    with pytest.raises(ValueError, match=r"'act\.weight': \(128,\)"):
        make('smoe', upcycle=path, **options)
