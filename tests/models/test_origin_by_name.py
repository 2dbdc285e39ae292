"""Weights by name, of this package, of timm or of a hub, beside the network of that name."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
from timm.models import save_for_hf

from vqmoe_vision.models.create import create_model

SPARSE, BY_ITSELF = 'test_vit_vqmoe', 'test_vit_dense'


@pytest.mark.parametrize(
    ('name', 'moe'), [(BY_ITSELF, None), (BY_ITSELF, {'method': 'smoe'}), (SPARSE, None)]
)
@pytest.mark.parametrize('tag', [None, 'cifar10'])
def test_weights_by_name_are_compared_with_the_network_of_the_name(
    name: str, moe: dict | None, tag: str | None
) -> None:
    given: dict[str, Any] = dict(pretrained=True, pretrained_cfg=tag)
    known = re.escape(f'{name}.cifar10' if tag else name)
    for options, told in (
        (dict(num_heads=4), 'num_heads=3, the model has num_heads=4'),
        (dict(act_layer='relu'), 'act_layer=gelu, the model has act_layer=relu$'),
    ):
        with pytest.raises(ValueError, match=f'of {known} .* {told}'):
            create_model(name, moe, **given, **options)
    model: Any = create_model(name, moe, **given)
    assert 'head.weight' in model.weights_report.loaded


@pytest.mark.parametrize('place', ['file', 'state_dict', 'folder'])
@pytest.mark.parametrize(('name', 'moe'), [(BY_ITSELF, None), (BY_ITSELF, {'method': 'smoe'})])
def test_weights_in_the_place_of_those_of_a_name_are_not_said_to_be_its(
    name: str, moe: dict | None, place: str, tmp_path: Path
) -> None:
    theirs = timm.create_model(name, num_heads=4)
    save_for_hf(theirs, tmp_path / 'L', model_args={'num_heads': 4}, safe_serialization=True)
    file = tmp_path / 'L/model.safetensors'
    if place == 'file':
        file = file.rename(tmp_path / 'bare.safetensors')
    overlay = {'file': str(file)} if place != 'state_dict' else {place: theirs.state_dict()}
    given = dict(pretrained=True, pretrained_cfg_overlay=overlay)
    model: Any = create_model(name, moe, **given, num_heads=4)
    assert 'head.weight' in model.weights_report.loaded
    if place == 'folder':
        with pytest.raises(
            ValueError, match=r'of test_vit_dense .* num_heads=4, the model has num_heads=3'
        ):
            create_model(name, moe, **given)
    else:  # a bare file says nothing
        create_model(name, moe, **given)
