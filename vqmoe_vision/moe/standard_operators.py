"""The experts in operators that every runtime has, for graphs that leave PyTorch.

Sparse as the dispatch of `dispatch.py`: an expert computes the rows that chose it, and no others.
How many these are is a size inside the graph, so that any routing and any batch run on one graph.
"""

from __future__ import annotations

from torch import Tensor

from .experts import Experts
from .routing import Routing


def run_experts(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """As `dispatch.run_experts`, one expert after the other, in the dtype of `x`."""
    chosen, weights = routing.indices.reshape(-1), routing.weights.reshape(-1, 1).to(x.dtype)
    if routing.kept is not None:
        chosen = chosen.masked_fill(~routing.kept.reshape(-1), experts.num_experts)
    per_token = 1 if routing.tokens is not None else routing.indices.shape[1]
    num_tokens = x.shape[0] if routing.tokens is not None else routing.indices.shape[0]
    own_inputs = per_token > 1 and x.shape[0] == routing.indices.numel()
    out = x.new_zeros(num_tokens, x.shape[1])
    for expert in range(experts.num_experts):
        assignments = (chosen == expert).nonzero().flatten()
        tokens = assignments // per_token if routing.tokens is None else routing.tokens[assignments]
        answers = _one_expert(experts, expert, x[assignments if own_inputs else tokens])
        out = out.index_add(0, tokens, answers * weights[assignments])
    return out


def _one_expert(experts: Experts, expert: int, rows: Tensor) -> Tensor:
    hidden = experts.drop1(experts.act(experts.fc1.one(expert, rows)))
    return experts.drop2(experts.fc2.one(expert, hidden))


def run_experts_evenly(experts: Experts, rows: Tensor) -> Tensor:
    """As `dispatch.run_experts_evenly`: stacked weights give two batched products."""
    hidden = experts.drop1(experts.act(experts.fc1.evenly(rows)))
    return experts.drop2(experts.fc2.evenly(hidden))
