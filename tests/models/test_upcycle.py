"""Dense weights in, experts out, through timm's loading: the same answers, all of it reported."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from .conftest import EXACT, TINY, check_complete, make


@pytest.mark.parametrize(('method', 'options'), EXACT)
def test_a_model_begins_with_the_answers_of_the_dense_one(
    method: str, options: dict[str, Any], saved: tuple[Any, str], images: torch.Tensor
) -> None:
    source, path = saved
    model = make(method, upcycle=path, **options).eval()
    torch.testing.assert_close(model(images), source(images), rtol=1e-5, atol=1e-5)


def test_every_tensor_is_reported(saved: tuple[Any, str], method: str) -> None:
    source, path = saved
    model: Any = make(method, upcycle=path)
    report = model.weights_report
    check_complete(report, model, source.state_dict())
    assert report.copied['blocks.1.mlp.experts.fc1.bias'] == 'blocks.1.mlp.fc1.bias'
    assert 'head.weight' in report.loaded and report.outside == report.unused == ()
    line = next(line for line in report.lines() if line.startswith('made of dense MLPs: '))
    assert 'blocks.3.mlp.experts.fc2.weight' in line


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
    with pytest.raises(ValueError, match=r'missing keys: blocks\.2\.attn\.proj\.weight'):
        make('smoe', upcycle=str(tmp_path / 'torn.pth'), num_classes=3)


def test_a_model_that_is_built_again_does_not_start_from_the_source_again(
    saved: tuple[Any, str], tmp_path: Path
) -> None:
    _, path = saved
    model: Any = make('smoe', upcycle=path, upcycling={'noise': 0.1}, num_experts=4)
    assert not {'upcycle', 'upcycling'} & model._model_args.keys()
    save_for_hf(model, tmp_path / 'moe')
    Path(path).unlink()
    again: Any = timm.create_model(f'local-dir:{tmp_path / "moe"}', pretrained=True)
    assert 'upcycle' not in json.loads((tmp_path / 'moe' / 'config.json').read_text())['model_args']
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


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
