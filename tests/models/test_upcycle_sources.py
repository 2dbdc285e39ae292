"""Networks, names, files and folders that dense weights come from, and what is read in them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from safetensors.torch import save_file
from timm.models import save_for_hf

from vqmoe_vision.engine.model import weights_normalization
from vqmoe_vision.engine.record import starting_weights
from vqmoe_vision.models.create import create_model

from .conftest import DENSE, TINY, dense, make


@pytest.mark.parametrize(('form', 'name'), [(Path, 'a.ckpt'), (str, 'A.PTH'), ('~', 'a.Pt')])
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


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    (dict(mean=[127.5] * 3, std=[127.5] * 3), 'mean'),
    (dict(mean=[0.5] * 3, std=[0.0] * 3), 'std'),
    (dict(mean=[float('nan')] * 3, std=[0.5] * 3), 'mean'),
    (dict(mean='x', std=[0.5] * 3), 'mean'),
    (dict(mean=[0.5] * 2, std=[0.5] * 3), 'mean'),
    (dict(mean=0.5, std=True), 'std'),
]


@pytest.mark.parametrize(('numbers', 'field'), IMPOSSIBLE)
def test_numbers_that_no_images_have_are_refused(
    numbers: dict[str, Any], field: str, saved: tuple[Any, str], tmp_path: Path
) -> None:
    save_for_hf(dense(), tmp_path / 'L', model_args=TINY, safe_serialization=True)
    file = tmp_path / 'L/config.json'
    content = json.loads(file.read_text())
    content['pretrained_cfg'].update(numbers)
    file.write_text(json.dumps(content))
    named = dict(pretrained=True, pretrained_cfg_overlay={'file': saved[1], **numbers})
    for place, build in {
        'pretrained_cfg_overlay.': lambda: create_model(DENSE, **TINY, **named),
        'pretrained_cfg.': lambda: make('smoe', upcycle=saved[1], pretrained_cfg=numbers),
        ".*config.json': ": lambda: make('smoe', upcycle=f'local-dir:{tmp_path}/L'),
    }.items():
        with pytest.raises(ValueError, match=f'^{place}{field}=.* is not possible'):
            build()
