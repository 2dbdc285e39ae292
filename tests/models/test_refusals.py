"""Weights of another network or of other experts are refused, and the line names in what."""

import re
from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor, nn

from vqmoe_vision.models.fitting import transfer

from .conftest import TINY, dense, fit_state, make

DINO = 'vit_small_patch16_dinov3'


def refusal(model: nn.Module, state: dict[str, Tensor]) -> str:
    with pytest.raises(ValueError, match=r"^checkpoint 'f\.pth' ") as caught:
        fit_state(cast(Any, model), state, 'f.pth')
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ('options', 'source', 'said'),
    [
        ({}, dict(embed_dim=64, num_heads=4), r'cls_token is \(1, 1, 64\)'),
        ({}, dict(no_embed_class=True), r'pos_embed is \(1, 16,.*no_embed_class=False'),
        (dict(no_embed_class=True), {}, r'pos_embed is \(1, 17, 32\).*no_embed_class=True'),
        ({}, dict(depth=6), 'unexpected keys: blocks.4.norm1'),
        ({}, dict(depth=3), 'missing keys: blocks.3.norm1'),
        (dict(init_values=0.1), {}, 'missing keys: blocks.0.ls1.gamma'),
        (dict(pre_norm=True), {}, 'unexpected keys: patch_embed.proj.bias'),
        ({}, dict(in_chans=1), r'proj.weight is \(32, 1, 8, 8\), the model'),
        ({}, dict(mlp_ratio=3.7), r'blocks.0.mlp.fc1.weight is \(118, 32\)'),
        ({}, dict(reg_tokens=3), 'unexpected keys: reg_token'),
        ({}, dict(norm_layer='rmsnorm'), 'missing keys: blocks.0.norm1.bias'),
        (dict(norm_layer='rmsnorm'), {}, 'unexpected keys: blocks.0.norm1.bias'),
    ],
)
def test_another_size_or_part_is_named(
    options: dict[str, Any], source: dict[str, Any], said: str
) -> None:
    assert re.search(said, refusal(make('smoe', **options), dense(**source).state_dict()))


def test_a_backbone_may_end_before_its_checkpoint() -> None:
    state = dense(depth=6).state_dict()
    fitted, _ = fit_state(cast(Any, make('smoe', num_classes=0)), state, 'f.pth')
    assert 'blocks.3.norm1.weight' in fitted and 'blocks.4.norm1.weight' not in fitted


def test_a_last_norm_that_is_missing_is_a_warning() -> None:
    """As in the weights of a backbone without one."""
    model: Any = dense(global_pool='avg')
    state = {k: v for k, v in model.state_dict().items() if not k.startswith('fc_norm.')}
    _, report = transfer(model, state, 'f.pth')
    said = [line for line in report.warnings if 'has no fc_norm.weight, fc_norm.bias' in line]
    assert len(said) == 1 and said[0] in report.lines()


@pytest.mark.parametrize(
    'name',
    ['beit_base_patch16_224', 'vit_relpos_small_patch16_224', 'vit_srelpos_small_patch16_224',
     'samvit_base_patch16', 'naflexvit_base_patch16_gap', 'vit_small_patch16_18x2_224',
     'vit_tiny_r_s16_p8_224'],
)  # fmt: skip
@pytest.mark.parametrize('host', ['vit_tiny_smoe', DINO])
def test_another_network_is_refused(name: str, host: str) -> None:
    with torch.device('meta'):
        names = timm.create_model(name).state_dict()
    state = {k: torch.zeros(v.shape) for k, v in names.items()}
    assert 'does not fit the model: ' in refusal(timm.create_model(host, **TINY), state)
