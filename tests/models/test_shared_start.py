"""Fresh experts begin like the MLPs in their place, however their model was built."""

from typing import Any, get_args, get_type_hints

import pytest
import timm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vqmoe_vision.models.create import create_model, share_start

from .. import cases
from .conftest import TINY

OWN, VIT, DINOV3 = 'vit_tiny_smoe', 'vit_tiny_patch16_224', 'vit_small_patch16_dinov3'
MOE = dict(method='smoe', moe_layers=[0, 1, 3])
# all that timm has but its default, and 'skip', which is refused
MODES = set(get_args(get_type_hints(VisionTransformer.__init__)['weight_init'])) - {'', 'skip'}


def spreads(model: Any) -> list[float]:
    """Standard deviation of the output layer of each MLP, or of its experts."""
    weights = [getattr(block.mlp, 'experts', block.mlp).fc2.weight for block in model.blocks]
    return [weight.std().item() for weight in weights]


def fresh(name: str, shared: bool, **options: Any) -> nn.Module:
    moe = {k: v for k, v in MOE.items() if name != OWN or k != 'method'}
    model = create_model(name, moe, **{**TINY, **options})
    if shared:
        share_start(model, name, seed=3, **{**TINY, **options})
    return model


@pytest.mark.parametrize('shared', [False, True])
@cases(
    'name, options, scaled',
    (OWN, {}, False),
    (OWN, {'fix_init': True}, True),
    (VIT, {}, False),
    (VIT, {'fix_init': True}, True),
    (DINOV3, {}, True),
)
def test_fresh_experts_are_spread_as_the_mlps_in_their_place(name, options, scaled, shared):
    dense = timm.create_model(VIT if name == OWN else name, **{**TINY, **options})
    found = spreads(fresh(name, shared, **options))
    assert found == pytest.approx(spreads(dense), rel=0.05)  # 0.5 % by chance
    expected = [0.02 / (2 * i) ** 0.5 if scaled else 0.02 for i in range(1, 5)]
    assert found == pytest.approx(expected, rel=0.05)


def check_parts(model: Any, weight_init: str) -> None:
    """Each parameter of the experts is spread as that of an MLP, and no expert is another."""
    dense = timm.create_model(VIT, **TINY, weight_init=weight_init)
    experts = model.blocks[1].mlp.experts
    for name, own in dense.blocks[1].mlp.named_parameters():
        ours = experts.get_parameter(name)
        tolerance = 0.05 if own.ndim == 2 else 0.5  # of biases there are few
        assert ours.std().item() == pytest.approx(own.std().item(), rel=tolerance), name
        assert ours.mean().item() == pytest.approx(0, abs=0.02)
        assert own.ndim == 1 or not ours[0].equal(ours[1])


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('name', [OWN, VIT])
@pytest.mark.parametrize('weight_init', sorted(MODES))
def test_weight_init_is_that_of_the_experts_too(name, weight_init, shared):
    model = fresh(name, shared, weight_init=weight_init)
    check_parts(model, weight_init)
    model.init_weights()  # of timm: draws all of it again
    check_parts(model, weight_init)


@pytest.mark.parametrize(
    'name, dense', [('test_vit_vqmoe', 'test_vit_dense'), ('vit_tiny_vqmoe', VIT)]
)
def test_the_rest_is_that_of_the_dense_model_of_the_shape(name, dense):
    models = [timm.create_model(each, img_size=32) for each in (name, dense)]
    for model, each in zip(models, (name, dense), strict=True):
        share_start(model, each, seed=3, img_size=32)
    ours, theirs = (model.state_dict() for model in models)
    shared = [key for key in theirs if key in ours]
    assert 'blocks.1.attn.qkv.weight' in shared and 'head.weight' in shared
    assert all(ours[key].equal(theirs[key]) for key in shared)
