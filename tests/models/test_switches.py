"""Experts that are switched off are as experts that were never there."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqmoe_vision.analysis.record import recorded
from vqmoe_vision.moe import moe_layers

from .conftest import make, shaken

# seventeen tokens; of five experts, or four, 2 tokens each are chosen where experts choose
SMALL = {'depth': 2, 'moe_layers': [0, 1], 'num_experts': 5}
CAPACITY = 10 / 17
OPTIONS: dict[str, dict[str, Any]] = {
    'ecmoe': {'capacity_factor': CAPACITY},
    'xmoe': {'router_dim': 3},
    'softmoe': {'slots_per_expert': 3},
    'vqmoe': {'num_codes': 10},
}
FEWER: dict[str, dict[str, Any]] = {
    'ecmoe': {'capacity_factor': CAPACITY * 4 / 5},
    'vqmoe': {'num_codes': 8, 'routed_scaling_factor': 5 / 2},  # as of five
}


def built(method: str, **options: Any) -> Any:
    return make(method, **{**SMALL, **OPTIONS.get(method, {}), **options})


def answers(model: nn.Module, images: Tensor, off: int | None) -> Tensor:
    on = torch.arange(5) != (5 if off is None else off)
    with torch.no_grad(), ExitStack() as stack:
        for layer in moe_layers(model).values():
            stack.enter_context(layer.switched(on))
        return model(images)


def without(model: nn.Module, method: str, off: int) -> nn.Module:
    """A model of four experts, that has all that belongs to those that are on."""
    smaller = built(method, num_experts=4, **FEWER.get(method, {})).eval()
    state = model.state_dict()
    for name, value in smaller.state_dict().items():
        for dim, (before, after) in enumerate(zip(state[name].shape, value.shape, strict=True)):
            if before != after:
                places = torch.arange(before)
                # slots of an expert stand together, codes have the experts in turn
                expert = places // 3 if 'slot' in name else places % 5
                state[name] = state[name].index_select(dim, places[expert != off])
    smaller.load_state_dict(state)
    return smaller


@pytest.mark.parametrize('off', [0, 3])
def test_an_expert_that_is_off_is_as_if_it_were_not_there(method, off):
    model, images = shaken(built(method)), torch.randn(4, 3, 32, 32)
    plain = answers(model, images, None)
    with torch.no_grad():
        assert torch.equal(model(images), plain)
        found = answers(model, images, off)
        if method == 'hashmoe':  # no other expert is next: the token is left to the residual
            for layer in moe_layers(model).values():
                layer.experts.fc2.weight[off] = layer.experts.fc2.bias[off] = 0
            expected = model(images)
        else:
            expected = without(model, method, off)(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3


def test_what_is_off_has_no_effect_where_fewer_are_on_than_a_token_takes(method):
    model, images = shaken(built(method)), torch.randn(2, 3, 32, 32)
    name, layer = next(iter(moe_layers(model).items()))
    found = []
    with layer.switched(torch.arange(5) == 4):
        with layer.switched(torch.arange(5) == 0):
            pass  # a block inside leaves the one around it as it was
        for _ in range(2):
            found.append(recorded(model, images)[name].outputs)
            with torch.no_grad():
                for parameter in layer.experts.parameters():
                    parameter[:4].normal_()
    assert torch.equal(*found) and found[0].abs().max() > 0
    if layer.experts_per_token < 5:
        with layer.switched(torch.zeros(5, dtype=torch.bool)):
            assert (recorded(model, images)[name].outputs == 0).all()
