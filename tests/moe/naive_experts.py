"""Experts as plain loops over assignments, and cases for them; dispatch and kernels equal these."""

import torch
import torch.nn.functional as F

from vqmoe_vision.moe.experts import Experts
from vqmoe_vision.moe.routing import Routing


def naive(experts, x, routing):
    """Assignment by assignment; parameters are read one expert at a time."""
    indices, weights, tokens = routing.indices, routing.weights, routing.tokens
    if tokens is None:
        tokens = torch.arange(len(indices))[:, None].expand_as(indices)
    kept = torch.ones_like(indices, dtype=torch.bool) if routing.kept is None else routing.kept
    rows = [torch.zeros_like(row) for row in x]
    for place in kept.nonzero():
        t, e = tokens[tuple(place)].item(), indices[tuple(place)].item()
        if experts.gate == 'separate':
            hidden = linear(experts.fc1_x, e, x[t]) * F.silu(linear(experts.fc1_g, e, x[t]))
        elif experts.gate:
            both = linear(experts.fc1, e, x[t])
            half = len(both) // 2
            parts = {'first': both[half:], 'last': both[:half]}
            gates = {'first': both[:half], 'last': both[half:]}
            hidden = parts[experts.gate] * F.silu(gates[experts.gate])
        else:
            hidden = F.gelu(linear(experts.fc1, e, x[t]))
        if experts.norm is not None:
            centred = hidden - hidden.mean()
            deviation = (centred.square().mean() + experts.norm.eps).sqrt()
            hidden = experts.norm.weight[e] * centred / deviation + experts.norm.bias[e]
        rows[t] = rows[t] + weights[tuple(place)] * linear(experts.fc2, e, hidden)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def linear(layer, expert, row):
    """One layer on one row."""
    answer = layer.weight[expert] @ row
    return answer if layer.bias is None else answer + layer.bias[expert]


def make_case(num_tokens, num_experts, k, dim, hidden, bias, seed=0, **form):
    """Experts of size one, tokens, distinct experts per token, and positive weights; float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    act = {'act_layer': torch.nn.SiLU} if form.get('gate') else {}
    experts = Experts(num_experts, dim, hidden, bias=bias, **act, **form, dtype=torch.float64)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(draw(*parameter.shape) / parameter.shape[-1] ** 0.5)
    x = draw(num_tokens, dim)
    indices = draw(num_tokens, num_experts).argsort(dim=1)[:, :k]
    return experts, x, indices, draw(num_tokens, k).abs()


def run_and_backward(function, experts, x, indices, weights, kept=None, tokens=None):
    """Output and gradients with respect to x, weights and every parameter, by name."""
    experts.zero_grad(set_to_none=True)
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = function(experts, x, Routing(indices, weights, kept=kept, tokens=tokens))
    # a cotangent that is different for every token and channel
    cotangent = torch.arange(1.0, out.numel() + 1, dtype=torch.float64).sin().view_as(out)
    (out * cotangent.to(out.dtype)).sum().backward()
    grads = {name: p.grad for name, p in experts.named_parameters()}
    return {'out': out.detach(), 'x': x.grad, 'weights': weights.grad, **grads}


def assert_same(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:  # the naive loop never touches an expert without tokens
            value = torch.zeros_like(actual[name])
        assert actual[name] is not None, name
        torch.testing.assert_close(
            actual[name],
            value.to(actual[name].dtype),
            msg=lambda m, n=name: f'{n}: {m}',
            **tolerance,
        )


# num_tokens, num_experts, k, dim, hidden
SHAPES = {
    'top-1': (12, 4, 1, 8, 16),
    'top-2': (12, 4, 2, 8, 16),
    'all experts': (5, 3, 3, 8, 8),
    'one expert': (6, 1, 1, 8, 8),
    'odd widths': (7, 3, 2, 5, 11),
    'one token': (1, 4, 2, 8, 16),
    'more experts than assignments': (3, 16, 2, 8, 8),
    'near even': (70, 4, 2, 5, 7),
}

# a few roundings of relative size 6e-8, 4e-3 and 5e-4, over sums of up to 140 products
TOLERANCES = {
    torch.float32: {'rtol': 1e-5, 'atol': 1e-5},
    torch.bfloat16: {'rtol': 5e-2, 'atol': 5e-2},
    torch.float16: {'rtol': 1e-2, 'atol': 1e-2},
}
