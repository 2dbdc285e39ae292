"""Sending tokens to experts and putting the answers together: dropless and exact.

A plan of the rows, a gather, two grouped linear layers, and a weighted sum. Each assignment has one
row, so that backward passes gather as well: autograd would scatter, on CPU one thread's work and a
tenth of a layer's time. Graphs that leave PyTorch take operators of all runtimes: an expert
computes the rows that chose it, and how many these are is a size inside the graph.

Legend: T tokens, K experts per token or branches, A assignments (T * K, or as many as a routing
names), R rows that stand together by expert, E experts, D width, S rows of each expert.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experts import Experts
from .kernels import compute_dtype, refuse_named
from .routing import Routing


def run_experts(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Weighted sum (T, D) of answers for tokens (T, D), or for inputs of assignments (T * K, D)."""
    flat, all_on = routing.indices, experts.switches is None
    if experts.switches is not None:
        flat = flat.masked_fill(~experts.switches[flat], experts.num_experts)
    if routing.kept is not None:
        assert routing.tokens is None, 'an assignment that is not kept is left out instead'
        flat = flat.masked_fill(~routing.kept, experts.num_experts)  # no expert's
    dtype = compute_dtype(x)
    if exporting():
        return _run_experts_exported(experts, x.to(dtype), routing, flat.reshape(-1))
    x, weights = x.to(dtype), routing.weights.flatten()
    sources: tuple
    bags: tuple
    if routing.tokens is not None:
        ranked, by_token = routing.tokens.sort(stable=True)
        starts = torch.searchsorted(ranked, torch.arange(len(x), device=x.device))
        weights = weights.index_select(0, by_token)
        if routing.even and all_on:
            bags = routing.tokens, by_token, starts
            rows = _Gather.apply(x, *bags).unflatten(0, (experts.num_experts, -1))
            rows = experts.evenly(rows).flatten(0, 1)
            return _Combine.apply(rows, weights.to(rows.dtype), *bags, None)
    plan = experts.plan(flat.reshape(-1), dtype, dropped=routing.kept is not None or not all_on)
    if routing.tokens is not None:
        bags = routing.tokens[plan.order], plan.inverse[by_token], starts
        sources = bags
    else:
        num_tokens, k = routing.indices.shape
        starts = torch.arange(0, num_tokens * k, k, device=x.device)
        sources = bags = plan.order // k, plan.inverse, starts
        if len(x) != num_tokens or k == 1:
            assert len(x) == num_tokens * k
            sources = plan.order, plan.inverse, None
    rows = experts(_Gather.apply(x, *sources), plan.groups)
    # of each row the weight, where none only fills a group
    places = plan.order if plan.groups.experts is not None and routing.tokens is None else None
    return _Combine.apply(rows, weights.to(rows.dtype), *bags, places)


def run_experts_evenly(experts: Experts, rows: Tensor) -> Tensor:
    """Every expert on as many rows of its own, (E, S, D) -> (E, S, D)."""
    exporting()  # refuses a kernel
    return experts.evenly(rows)


class Branch(NamedTuple):
    """What one of several branches over the same experts asks of them, for every token."""

    inputs: Tensor  # (T, D), what its expert is fed
    experts: Tensor  # (T,) int64 in [0, E)
    weights: Tensor  # (T, 1) float32


def run_branches(
    experts: Experts,
    branches: Sequence[Branch],
    gates: Tensor | None = None,  # (T, K) float32, factors of the weights
    last_norm: nn.Module | None = None,  # of the answers of the last branch
) -> Tensor:
    """Weighted sum (T, D) of branches: one sort, and one pass over the experts' weights."""
    weights = torch.cat([branch.weights for branch in branches], dim=1)
    if gates is not None:
        weights = weights * gates
    indices = torch.stack([branch.experts for branch in branches], dim=1)
    dtype = compute_dtype(branches[0].inputs)
    inputs = torch.stack([branch.inputs.to(dtype) for branch in branches], dim=1).flatten(0, 1)
    if last_norm is None:
        return run_experts(experts, inputs, Routing(indices, weights))
    each = Routing(indices.view(-1, 1), torch.ones_like(weights).view(-1, 1))
    answers = list(run_experts(experts, inputs, each).unflatten(0, indices.shape).unbind(1))
    answers[-1] = last_norm(answers[-1]).to(dtype)
    pairs = zip(answers, weights.to(dtype).split(1, dim=1), strict=True)
    return torch.stack([answer * weight for answer, weight in pairs]).sum(dim=0)


def exporting() -> bool:
    """Whether a graph is made for other runtimes, in which this package's operators are unknown."""
    found = torch.compiler.is_exporting()
    if found:
        refuse_named('in a graph that is exported, its operators are those of every runtime')
    return found


def _run_experts_exported(experts: Experts, x: Tensor, routing: Routing, chosen: Tensor) -> Tensor:
    """As `run_experts`, one expert after the other; `chosen` (A,) is E where none computes."""
    weights = routing.weights.reshape(-1, 1).to(x.dtype)
    per_token = 1 if routing.tokens is not None else routing.indices.shape[1]
    num_tokens = x.shape[0] if routing.tokens is not None else routing.indices.shape[0]
    own_inputs = per_token > 1 and x.shape[0] == routing.indices.numel()
    out = x.new_zeros(num_tokens, x.shape[1])
    for expert in range(experts.num_experts):
        assignments = (chosen == expert).nonzero().flatten()
        tokens = assignments // per_token if routing.tokens is None else routing.tokens[assignments]
        rows = x[assignments if own_inputs else tokens]
        out = out.index_add(0, tokens, experts.one(expert, rows) * weights[assignments])
    return out


# Of each row the token, (R,) int64, which a row that only fills a group has too; of each token in
# turn the rows, (A,), and where they begin, (T,). None where each token has one row.


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, rows: Tensor, starts: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, starts)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        rows, starts = ctx.saved_tensors
        if starts is None:
            return grads[0].index_select(0, rows), None, None, None
        return F.embedding_bag(rows, grads[0], starts, mode='sum'), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, answers: Tensor, weights: Tensor, *bags: Any) -> Tensor:
        tokens, rows, starts, places = bags
        ctx.save_for_backward(answers, weights, tokens, rows, places)
        return F.embedding_bag(rows, answers, starts, mode='sum', per_sample_weights=weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        answers, weights, tokens, rows, places = ctx.saved_tensors
        by_row = grads[0].index_select(0, tokens)
        grad_weights = torch.linalg.vecdot(by_row, answers).index_select(0, rows)
        if places is not None:
            row_weights = weights.index_select(0, places)
        else:  # rows that only fill a group get no gradient: their weight is zero
            row_weights = weights.new_zeros(len(answers)).scatter_(0, rows, weights)
        return by_row.mul_(row_weights[:, None]), grad_weights, None, None, None, None
