"""Models that travel: what timm's `save_for_hf` writes builds the same model, bit for bit."""

import json
import os
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from vqmoe_vision.models import export
from vqmoe_vision.models.create import create_model
from vqmoe_vision.moe import METHODS

from .. import cases
from ..variants import VARIANTS
from .conftest import TINY, make

PREPROCESSING: dict[str, Any] = {
    'input_size': (3, 32, 32),
    'mean': (0.1, 0.2, 0.3),
    'std': (0.4, 0.5, 0.6),
    'crop_pct': 0.8,
    'crop_mode': 'squash',
    'interpolation': 'bilinear',
}


def same(model: nn.Module, again: nn.Module, images: Tensor) -> None:
    state, found = model.state_dict(), again.state_dict()
    assert list(state) == list(found)
    for name, value in state.items():
        assert value.dtype == found[name].dtype
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    torch.testing.assert_close(again.eval()(images), model.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize('recorded', [True, False])
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_method_with_all_its_options(variant, recorded, tmp_path, images, train_step):
    method, options = VARIANTS[variant]
    model: Any = make(method, depth=2, moe_layers=[0], **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # codebooks start, stages count
        train_step(model, optimizer, images, torch.arange(4))
    args = None
    if not recorded:
        model._model_args = {}
        args = {**TINY, 'depth': 2, 'moe_layers': [0], **options}
    save_for_hf(model, str(tmp_path), model_args=args, safe_serialization=True)
    assert sorted(os.listdir(tmp_path)) == ['config.json', 'model.safetensors']
    again: Any = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert again.moe_config == model.moe_config
    same(model, again, images)
    again.train()  # and it goes on as the model would
    torch.manual_seed(1)
    loss = train_step(model, None, images, torch.arange(4))
    torch.manual_seed(1)
    torch.testing.assert_close(train_step(again, None, images, torch.arange(4)), loss)


@cases(
    'variant, before, after',
    *((variant, {'img_size': (32, 64)}, {'img_size': 32}) for variant in VARIANTS),
    *((method, {}, {'img_size': 48}) for method in METHODS),
    *((method, {'reg_tokens': 2}, {'patch_size': 4}) for method in METHODS),
)
def test_a_model_whose_images_have_another_size_by_now(variant, before, after, tmp_path):
    method, options = VARIANTS.get(variant, (variant, {}))
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
    with pytest.raises(ValueError, match=f'^timm does not build the model again .*{problem}'):
        export.save(model, tmp_path / 'out', PREPROCESSING)
