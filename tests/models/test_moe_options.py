"""What a config leaves to the code is what the models are built with."""

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch

from vqmoe_vision.models.create import create_model, options_in_full

from ..variants import VARIANTS

SIZES = {'depth': 2, 'embed_dim': 24, 'num_heads': 2, 'img_size': 32, 'num_classes': 3}


@pytest.mark.parametrize(('method', 'options'), VARIANTS.values(), ids=VARIANTS)
def test_options_in_full_are_those_of_the_model(method: str, options: dict[str, Any]) -> None:
    name = f'vit_tiny_{method}'
    found = options_in_full({'model_name': name, 'moe': options, **SIZES})
    assert found.pop('method') == method
    assert json.loads(json.dumps(found)) == found
    with torch.device('meta'):
        model: Any = create_model(name, options, **SIZES)
    config = model.moe_config
    assert found == {n: v for n, v in asdict(config).items() if n not in config.unused()}
    # the other two ways to write them
    assert options_in_full({'model_name': name, **options}) == {'method': method, **found}
    host = {'model_name': 'vit_tiny_patch16_224', 'moe': {'method': method, **options}}
    assert options_in_full(host) == {'method': method, **found}
