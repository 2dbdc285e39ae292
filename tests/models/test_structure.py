"""Models without values."""

import torch
from torch import nn

from vqmoe_vision.models.structure import structure_only


def test_names_and_shapes_are_those_of_the_model(tiny_variant) -> None:
    expected = {name: value.shape for name, value in tiny_variant().state_dict().items()}
    before = torch.random.get_rng_state()
    with structure_only():
        model = tiny_variant()
    state = model.state_dict()
    assert {name: value.shape for name, value in state.items()} == expected
    assert all(value.is_meta for value in state.values())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_values_that_a_tensor_has_are_drawn() -> None:
    drawn, expected = torch.zeros(2, 5)
    torch.manual_seed(1)
    with structure_only():
        nn.init.normal_(drawn).clamp_(max=0.5)
        unit = nn.functional.normalize(drawn, dim=0)
    torch.manual_seed(1)
    expected.normal_().clamp_(max=0.5)
    assert torch.equal(drawn, expected)
    torch.testing.assert_close(unit.norm(), torch.tensor(1.0))
