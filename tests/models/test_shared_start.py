"""Fresh experts begin like the MLPs in their place, however their model was built."""

from typing import Any

import pytest
import timm
from torch import Tensor, nn

from vqmoe_vision.models.create import create_model
from vqmoe_vision.models.shared_start import share_start

from .conftest import TINY

OWN, VIT, DINOV3 = 'vit_tiny_smoe', 'vit_tiny_patch16_224', 'vit_small_patch16_dinov3'
MOE = dict(method='smoe', moe_layers=[0, 1, 3])


def spreads(model: Any) -> list[float]:
    """Standard deviation of the output layer of each MLP, or of its experts."""
    weights: list[Tensor] = [
        getattr(block.mlp, 'experts', block.mlp).fc2.weight for block in model.blocks
    ]
    return [weight.std().item() for weight in weights]


def fresh(name: str, shared: bool, **options: Any) -> nn.Module:
    moe = {k: v for k, v in MOE.items() if name != OWN or k != 'method'}
    model = create_model(name, moe, **{**TINY, **options})
    if shared:
        share_start(model, name, seed=3, **{**TINY, **options})
    return model


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize(
    ('name', 'options', 'scaled'),
    [
        (OWN, {}, False),
        (OWN, {'fix_init': True}, True),
        (VIT, {}, False),
        (VIT, {'fix_init': True}, True),
        (DINOV3, {}, True),
    ],
)
def test_fresh_experts_are_spread_as_the_mlps_in_their_place(
    name: str, options: dict[str, Any], scaled: bool, shared: bool
) -> None:
    dense = timm.create_model(VIT if name == OWN else name, **{**TINY, **options})
    found = spreads(fresh(name, shared, **options))
    assert found == pytest.approx(spreads(dense), rel=0.05)  # 0.5 % by chance
    expected = [0.02 / (2 * i) ** 0.5 if scaled else 0.02 for i in range(1, 5)]
    assert found == pytest.approx(expected, rel=0.05)
