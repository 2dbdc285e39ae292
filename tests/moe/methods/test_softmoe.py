"""SoftMoE against a plain loop over images and slots, and the properties of its two mixtures."""

import pytest
import torch
import torch.nn.functional as F

from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe.experts import Experts
from vqmoe_vision.moe.raw_patches import Host

from ... import cases
from ..by_hand import assert_by_hand, expert

D, E = 8, 4


def naive(layer, x):
    """Algorithm 2 image by image, slot by slot, or the norms of preset 'lucidrains'."""
    out = []
    for image in x:
        tokens, slots = F.normalize(image, dim=-1), F.normalize(layer.slot_embed, dim=-1)
        if layer.slot_norm == 'rms':
            # its experts read normalised tokens: the scale of the input is lost
            image = tokens = tokens * D**0.5 * layer.token_norm.weight
            logits = tokens @ (slots * D**0.5 * layer.slot_gain).t()
        else:
            logits = layer.scale * tokens @ slots.t()
        dispatch = logits.exp() / logits.exp().sum(dim=0, keepdim=True)
        combine = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
        answers = []
        for s in range(layer.num_slots):
            slot = (dispatch[:, s, None] * image).sum(dim=0)
            answers.append(expert(layer.experts, s // layer.slots_per_expert, slot))
        out.append(combine @ torch.stack(answers))
    return torch.stack(out)


@pytest.mark.parametrize('num_tokens', [1, 5, 40])
@pytest.mark.parametrize('options', [{'init_scale': 3.0}, {'preset': 'lucidrains'}], ids=str)
def test_output_and_every_gradient(make_layer, options, num_tokens):
    layer = make_layer('softmoe', slots_per_expert=3, **options).layer
    with torch.no_grad():
        if layer.slot_norm == 'rms':
            layer.token_norm.weight.uniform_(0.5, 2)
            layer.slot_gain.uniform_(0.5, 2)
    x = torch.randn(3, num_tokens, D)
    assert_by_hand(layer, lambda x: naive(layer, x), x, rtol=1e-4, atol=1e-4)


@cases(
    'num_experts, ratio, prefix, slots',
    (4, 2.0, 0, 18),  # 2 * 36 patches / 4
    (4, 2.0, 1, 18),  # the class token is no patch
    (4, 2.0, 5, 18),
    (8, 1.0, 1, 4),  # 36 / 8 = 4.5, to even
    (8, 0.1, 1, 1),  # at least one,
)
def test_slots_per_token_counts_patches(num_experts, ratio, prefix, slots):
    entry = METHODS['softmoe']
    config = entry.config(num_experts=num_experts, slots_per_token=ratio)
    layer = entry.build(D, config, Experts(num_experts, D, 4), Host(36 + prefix, prefix))
    assert (layer.slots_per_expert, layer.num_slots) == (slots, slots * num_experts)


@pytest.mark.parametrize('preset', ['paper', 'lucidrains'])
def test_autocast_rounds_products_and_no_softmax(make_layer, preset):
    layer = make_layer('softmoe', preset=preset).layer
    x = torch.randn(2, 500, D)
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    # bfloat16 rounds products (2^-8), not the sums of 500 exponentials
    assert (out - layer(x)).norm() < 0.01 * layer(x).norm()
