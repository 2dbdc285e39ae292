"""Dense, the GEMM-only bound, the naive loop, and the dispatch of this package.

Legend: B images, N tokens per image, T = B * N, D width, H hidden width, E experts, K experts per
token, C rows per expert.
"""

import copy
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from vqmoe_vision.moe.dispatch import run_experts
from vqmoe_vision.moe.experts import Experts, StackedLinear
from vqmoe_vision.moe.kernels import Groups, compute_dtype
from vqmoe_vision.moe.routing import Routing, Switched

from .cells import Cell, Settings
from .contenders import Contender, Forward, place
from .inputs import Batch, Inputs

PROBE_ROUNDS = 4  # batches on which drop rates and loads are read before anything is timed


def dense(cell: Cell, settings: Settings, inputs: Inputs) -> list[Contender]:
    """One MLP of hidden width K * H on all tokens: the same active FLOPs."""
    module = place(Mlp(cell.width, cell.top_k * cell.hidden), cell, settings)
    macs = cell.num_rows * 2 * cell.width * cell.hidden
    return [Contender('dense', module, on_tokens, cell.num_rows, macs)]


def on_tokens(
    module: nn.Module, batch: Batch, call: Callable[[Tensor], Tensor] | None = None
) -> Sequence[Tensor]:
    return [(module if call is None else call)(batch.x)]


class BatchedLinear(torch.autograd.Function):
    """A linear layer of every expert; autograd's own `bmm` would transpose weight gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(E, C, in) -> (E, C, out)."""
        ctx.save_for_backward(rows, weight)
        return torch.baddbmm(bias[:, None], rows, weight.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad,) = grads
        rows, weight = ctx.saved_tensors
        return grad @ weight, grad.mT @ rows, grad.sum(dim=1)


class Grouped(nn.Module):
    """Every expert on its own C rows, as batched products of rows that are already in place."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.experts = make_experts(cell)
        rows = -(-cell.num_rows // cell.experts)
        self.rows = nn.Parameter(torch.randn(cell.experts, rows, cell.width))

    def forward(self) -> Tensor:
        """(E, C, D) -> (E, C, D)."""
        hidden = self.experts.act(self._linear(self.experts.fc1, self.rows))
        return self._linear(self.experts.fc2, hidden)

    def _linear(self, linear: StackedLinear, rows: Tensor) -> Tensor:
        assert linear.bias is not None
        dtype = compute_dtype(rows)
        weight, bias = linear.weight.to(dtype), linear.bias.to(dtype)
        found: Tensor = BatchedLinear.apply(rows.to(dtype), weight, bias)
        return found


def bound(cell: Cell, settings: Settings, inputs: Inputs) -> list[Contender]:
    """What the experts' matrix products and activations alone cost, at even load."""
    module = place(Grouped(cell), cell, settings)
    rows = module.get_parameter('rows').shape[1] * cell.experts
    macs = rows * 2 * cell.width * cell.hidden
    return [Contender('bound', module, lambda module, batch: [module()], rows, macs)]


def make_experts(cell: Cell) -> Experts:
    """Experts of a cell, biases too drawn at random, or an error there could not be seen."""
    experts = Experts(cell.experts, cell.width, cell.hidden)
    for linear in (experts.fc1, experts.fc2):
        assert linear.bias is not None
        nn.init.normal_(linear.bias, std=0.02)
    return experts


def loop(cell: Cell, settings: Settings, inputs: Inputs) -> list[Contender]:
    """One expert after the other by `W[e]` and `index_add`, as most implementations do."""
    return [_experts_only('loop', experts_loop, None, cell, settings, inputs)]


def ours(cell: Cell, settings: Settings, inputs: Inputs) -> list[Contender]:
    """Dispatch and experts, given indices and weights."""
    return [_experts_only('ours', experts_grouped, experts_loop, cell, settings, inputs)]


def _experts_only(
    name: str,
    forward: Forward,
    oracle: Forward | None,
    cell: Cell,
    settings: Settings,
    inputs: Inputs,
) -> Contender:
    module = place(make_experts(cell), cell, settings)
    macs = cell.num_rows * 2 * cell.width * cell.hidden
    indices = [inputs.batch(index).indices.flatten() for index in range(PROBE_ROUNDS)]
    load = mean_load([i.bincount(minlength=cell.experts) for i in indices])
    return Contender(name, module, forward, cell.num_rows, macs, oracle, load=load)


def mean_load(counts: Iterable[Tensor]) -> float:
    """Fullest expert over mean load, averaged over batches of counts (E,)."""
    return statistics.mean((c.max() / c.double().mean()).item() for c in counts)


def experts_grouped(
    module: nn.Module, batch: Batch, kept: Tensor | None = None
) -> Sequence[Tensor]:
    assert isinstance(module, Experts)
    routing = Routing(batch.indices, batch.weights, kept=kept)
    return [run_experts(module, batch.x.flatten(0, 1), routing)]


def run_experts_loop(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """As `run_experts` on tokens, one expert after the other: slow, plain, the oracle."""
    indices, weights = routing.indices, routing.weights
    weights = weights if routing.kept is None else weights * routing.kept
    tokens = routing.tokens
    if tokens is None:
        tokens = torch.arange(len(x), device=x.device)[:, None].expand_as(indices)
    out = torch.zeros_like(x)
    fc1, fc2 = experts.fc1, experts.fc2
    for e in range(experts.num_experts):
        chosen = indices == e
        token = tokens[chosen]
        hidden = F.linear(x[token], fc1.weight[e], None if fc1.bias is None else fc1.bias[e])
        answer = F.linear(
            experts.act(hidden), fc2.weight[e], None if fc2.bias is None else fc2.bias[e]
        )
        out.index_add_(0, token, answer * weights[chosen][:, None].to(answer.dtype))
    return out


def experts_loop(module: nn.Module, batch: Batch, kept: Tensor | None = None) -> Sequence[Tensor]:
    """What `loop` times, and the oracle of `ours`."""
    assert isinstance(module, Experts)
    tokens = batch.x.flatten(0, 1)
    tokens = tokens.to(compute_dtype(tokens))
    routing = Routing(batch.indices, batch.weights, kept=kept)
    return [run_experts_loop(module, tokens, routing)]


class ExpertsLoop(Switched):
    """Experts that take sorted rows and run as a plain loop."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts, self.num_experts = experts, experts.num_experts
        self.plan = experts.plan

    def evenly(self, rows: Tensor) -> Tensor:
        """As `Experts`: (E, S, D) -> (E, S, D)."""
        ends = rows.shape[1] * torch.arange(1, len(rows) + 1, device=rows.device)
        return self(rows.flatten(0, 1), Groups(ends)).view(rows.shape)

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        """As `Experts`: (R, D) -> (R, D)."""
        counts = F.pad(groups.ends, (1, 0)).diff().long()
        indices = torch.arange(self.num_experts, device=rows.device).repeat_interleave(counts)
        weights = torch.ones_like(indices, dtype=torch.float32)
        return run_experts_loop(self.experts, rows, Routing(indices[:, None], weights[:, None]))


def with_loops(module: nn.Module) -> nn.Module:
    """A layer that shares every parameter with `module`, with its experts as a plain loop."""
    plain = copy.copy(module)
    experts = module.get_submodule('experts')
    assert isinstance(experts, Experts)
    plain._modules = {**module._modules, 'experts': ExpertsLoop(experts)}
    return plain
