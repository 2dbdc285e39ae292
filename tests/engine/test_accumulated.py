"""What waits for more batches, in checkpoints."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from vqmoe_vision import collect_losses, update_state
from vqmoe_vision.engine.loops import keep_accumulated, restore_accumulated


def test_gradients_that_wait_are_kept_where_a_training_goes_on() -> None:
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    wrapper = SimpleNamespace(should_update=lambda: False)
    runner: Any = SimpleNamespace(model=model, optim_wrapper=wrapper)
    goes_on: dict[str, Any] = {'optimizer': {}}
    keep_accumulated(runner, goes_on)
    assert goes_on['accumulated']['gradients'].keys() == {'weight', 'bias'}
    best: dict[str, Any] = {}  # which is saved without an optimizer
    keep_accumulated(runner, best)
    assert best == {}


@pytest.mark.parametrize(
    ('method', 'options'), [('vqmoe', {}), ('smoe', {'bias_update_rate': 0.1})]
)
def test_what_layers_have_observed_waits_in_the_checkpoint(method: str, options: dict) -> None:
    sizes = dict(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, moe_layers=[0])
    make = partial(timm.create_model, f'vit_tiny_{method}', num_experts=4, **sizes, **options)
    model, resumed = make(), make()
    resumed.load_state_dict(model.state_dict())
    with collect_losses(model, update_state=False):
        model(torch.randn(2, 3, 8, 8))
    checkpoint: dict[str, Any] = {'optimizer': {}}
    wrapper = SimpleNamespace(should_update=lambda: False)
    runner: Any = SimpleNamespace(model=model, optim_wrapper=wrapper)
    keep_accumulated(runner, checkpoint)
    logger = SimpleNamespace(info=lambda text: None)
    restore_accumulated(SimpleNamespace(model=resumed, logger=logger), checkpoint)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for each in (model, resumed):
        update_state(each)
    found, expected = resumed.state_dict(), model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(not torch.equal(before[name], value) for name, value in expected.items())
