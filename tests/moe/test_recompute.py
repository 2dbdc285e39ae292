"""GELU computed again in the backward pass: same numbers, and what is kept until then."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vqmoe_vision.moe import dispatch, use_kernel
from vqmoe_vision.moe.experts import Experts
from vqmoe_vision.moe.routing import Routing

from .naive_experts import assert_same, make_case, naive, run_and_backward

E, D, H, T, K = 4, 8, 32, 24, 2


def make(approximate='none', **options):
    gelu = lambda: nn.GELU(approximate)  # noqa: E731
    return Experts(E, D, H, gelu, dtype=torch.float64, **options)


def kept_bytes(run):
    """Bytes of storages that autograd keeps of a pass, each counted once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(storages.values())


@pytest.fixture
def both() -> Iterator:
    """A case whose experts keep GELU's answers, and one whose experts do not."""
    plain, x, indices, weights = make_case(T, E, K, D, H, bias=True)
    again = Experts(E, D, H, recompute='gelu', dtype=torch.float64)
    again.load_state_dict(plain.state_dict())
    return (plain, x, indices, weights), (again, x, indices, weights)


@pytest.mark.parametrize('kernel', ['batched', 'reference'])
def test_numbers_are_equal_to_the_bit(both, kernel):
    with use_kernel(kernel):
        kept, again = (run_and_backward(dispatch.run_experts, *case) for case in both)
    for name, value in kept.items():
        assert torch.equal(again[name], value), name
    assert_same(again, run_and_backward(naive, *both[0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('form', ['compiled', 'checkpointed', 'autocast', 'frozen', 'tanh'])
def test_numbers_are_equal_where(both, form):
    def run(experts, x, routing):
        if form == 'checkpointed':
            return checkpoint(dispatch.run_experts, experts, x, routing, use_reentrant=False)
        with torch.autocast('cpu', torch.bfloat16, enabled=form == 'autocast'):
            return dispatch.run_experts(experts, x, routing)

    found = []
    for experts, x, indices, weights in both:
        experts = experts.float()
        if form == 'frozen':
            experts.fc2.requires_grad_(False)
        if form == 'tanh':
            experts.act = nn.GELU('tanh')
        torch._dynamo.reset()
        of = torch.compile(run, backend='aot_eager', fullgraph=True) if form == 'compiled' else run
        case = experts, x.float(), indices.contiguous(), weights.float()
        found.append(run_and_backward(of, *case))
    plain, again = found
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        assert (value is None and again[name] is None) or torch.equal(again[name], value), name


def test_answers_of_gelu_are_not_kept(both):
    plain, again = (
        kept_bytes(lambda c=case: dispatch.run_experts(c[0], c[1], Routing(*c[2:])))
        for case in both
    )
    rows = len(placed(both))
    assert plain - again == rows * H * 8  # bytes of float64


def placed(both):
    (experts, _, indices, _), _ = both
    return experts.plan(indices.flatten(), torch.float64).order


def test_what_cannot_be_computed_again_is_refused():
    for options in ({'drop': 0.1}, {'act_layer': nn.ReLU}):
        with pytest.raises(ValueError, match='^recompute='):
            Experts(E, D, H, recompute='gelu', **options)
