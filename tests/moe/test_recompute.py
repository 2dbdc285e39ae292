"""GELU computed again in the backward pass: same numbers, and what is kept until then."""

import re
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import GELU, GELUTanh, QuickGELU
from torch import nn
from torch.utils.checkpoint import checkpoint

import vqmoe_vision.models  # noqa: F401  registers the models
from vqmoe_vision import collect_losses
from vqmoe_vision.moe import METHODS, dispatch, use_kernel
from vqmoe_vision.moe.experts import Experts

from .. import on_meta
from .naive_experts import make_case, run_and_backward

E, D, H, T, K = 4, 8, 32, 24, 2
PAGE = Path(__file__).parents[2] / 'docs/explanation/performance.md'


def kept_by_layer(method, **options):
    """MiB that a layer of ViT-B keeps beside its parameters: 128 images, bfloat16, on a card."""
    name = f'vit_base_{method}' if method in METHODS else 'vit_base_patch16_224'
    options |= {'moe_layers': [0]} if method in METHODS else {}
    with on_meta():
        model = timm.create_model(name, depth=1, **options).bfloat16()
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept, mlp = {}, model.blocks[0].mlp

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    mlp.register_forward_pre_hook(lambda *_: hooks.__enter__() and None)
    mlp.register_forward_hook(lambda *_: hooks.__exit__())
    with use_kernel('grouped_mm'), collect_losses(model):
        model(torch.empty(128, 3, 224, 224, device='meta', dtype=torch.bfloat16))
    return sum(s.nbytes() for address, s in kept.items() if address not in own) / 2**20


@pytest.mark.parametrize('method', ['dense', *METHODS])
def test_the_docs_say_what_a_layer_keeps(method):
    row = re.search(rf'^\|{method}\|(.*)\|$', PAGE.read_text(), re.MULTILINE)[1]
    found = [kept_by_layer(method)]
    if method in METHODS:
        found.append(kept_by_layer(method, recompute='gelu'))
        # GELU's answers for every row, as wide as an expert's hidden layer, of two bytes: none less
        assert (found[0] - found[1]) % (128 * 3072 * 2 / 2**20) == 0
    assert found == pytest.approx([float(cell) for cell in row.split('|')[: len(found)]], rel=0.02)


ACTS = {'tanh': partial(nn.GELU, 'tanh'), 'timm': GELU, 'compiled timm tanh': GELUTanh}
FORMS = ['batched', 'reference', 'compiled', 'checkpointed', 'autocast', 'frozen', *ACTS]


@pytest.mark.parametrize('form', FORMS)
def test_numbers_are_equal_to_the_bit(form):
    def run(experts, x, routing):
        if form == 'checkpointed':
            return checkpoint(dispatch.run_experts, experts, x, routing, use_reentrant=False)
        with torch.autocast('cpu', torch.bfloat16, enabled=form == 'autocast'):
            return dispatch.run_experts(experts, x, routing)

    plain, x, indices, weights = make_case(T, E, K, D, H, bias=True)
    plain.act, act = ACTS.get(form, nn.GELU)(), ACTS.get(form, nn.GELU)
    again = Experts(E, D, H, act, recompute='gelu', dtype=torch.float64)
    again.load_state_dict(plain.state_dict())
    found = []
    for experts in (plain.float(), again.float()):
        if form == 'frozen':
            experts.fc2.requires_grad_(False)
        torch._dynamo.reset()
        compiled = form.startswith('compiled')
        of = torch.compile(run, backend='aot_eager', fullgraph=True) if compiled else run
        with use_kernel('reference' if form == 'reference' else 'batched'):
            case = experts, x.float(), indices.contiguous(), weights.float()
            found.append(run_and_backward(of, *case))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_what_cannot_be_computed_again_is_refused():
    for options in ({'drop': 0.1}, {'act_layer': nn.ReLU}, {'act_layer': QuickGELU}):
        with pytest.raises(ValueError, match=r'^recompute='):
            Experts(E, D, H, recompute='gelu', **options)
