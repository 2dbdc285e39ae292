"""Experts as one stacked parameter per weight.

Legend: A assignments, R rows sorted by expert, E experts, S rows of each, D width.

Stacked, not a ModuleList: an expert that no token chose has a zero gradient instead of none, which
data-parallel training and timm's test suite need.
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import check
from .kernels import Groups, Plan, even_linear, grouped_linear, make_plan, placed, refuse_named
from .kernels.cpu import sorted_plan
from .routing import Switched


class StackedLinear(nn.Module):
    """E linear layers, applied to consecutive groups of rows."""

    stacks_experts = True  # what `per_expert` looks for
    own: Callable[[Any], Tensor] = staticmethod(lambda whole: whole)  # takes this process's part
    draw: Callable[[nn.Linear], None] | None = None  # initialises one layer

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(self.weight.shape[:2], **factory)) if bias else None
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as timm's ViT: truncated normal of 0.02, zero bias, unless `draw` is set."""
        if self.draw is not None:
            # one by one: kaiming misreads the fan of (8, 384, 1536), and is 20 times too small
            for expert in range(len(self.weight)):
                self.draw(self.layer(expert))
            return
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    reset_parameters = init_weights

    def layer(self, expert: int) -> nn.Linear:
        """One of the layers, whose parameters are in the memory of these."""
        sizes = self.in_features, self.out_features
        linear = nn.Linear(*sizes, self.bias is not None, device='meta')
        for name, whole in self.named_parameters():
            setattr(linear, name, nn.Parameter(whole[expert].detach(), whole.requires_grad))
        return linear

    def no_weight_decay(self) -> set[str]:
        """The biases, which optimizers know by their single dimension elsewhere."""
        return {'bias'} if self.bias is not None else set()

    def forward(self, rows: Tensor, groups: Groups, gelu: str | None = None) -> Tensor:
        """Apply layer e to rows ends[e - 1]:ends[e], or to GELU's answers for them.

        Rows past the last end give zero.
        """
        bias = None if self.bias is None else self.own(self.bias)
        return grouped_linear(rows, self.own(self.weight), bias, groups, gelu)

    def one(self, expert: int, rows: Tensor) -> Tensor:
        """Apply one layer to rows (R, in), maybe none, in operators that every runtime has."""
        return F.linear(rows, self.weight[expert], None if self.bias is None else self.bias[expert])

    def evenly(self, rows: Tensor, gelu: str | None = None) -> Tensor:
        """Apply each layer to its own rows (E, S, in), in operators that every runtime has."""
        return even_linear(rows, self.weight, self.bias, gelu)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f'num_experts={self.weight.shape[0]}, {self.in_features} -> {self.out_features}'


class SeparateLinear(nn.ModuleList):
    """The layers of a `StackedLinear` as E modules `nn.Linear`, which other tools look for."""

    def __init__(self, stacked: StackedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = stacked.in_features, stacked.out_features
        for expert in range(len(stacked.weight)):
            self.append(copy.deepcopy(stacked.layer(expert)).train(stacked.training))

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        """As that of `StackedLinear`."""
        refuse_named('experts that are separate linear layers, each computes its own rows')
        ends = [0, *groups.ends.tolist(), len(rows)]
        *parts, rest = rows.split([end - start for start, end in pairwise(ends)])
        # a layer without rows is not called: kernels of int8 take none
        answers = [layer(group) for layer, group in zip(self, parts, strict=True) if len(group)]
        return torch.cat([*answers, rest.new_zeros(len(rest), self.out_features)])

    def one(self, expert: int, rows: Tensor) -> Tensor:
        """As that of `StackedLinear`."""
        # how many rows there are is unknown to a graph, and torchao asks whether it is one
        return self[expert](F.pad(rows, (0, 0, 0, 2)))[: rows.shape[0]]

    def evenly(self, rows: Tensor) -> Tensor:
        """As that of `StackedLinear`."""
        refuse_named('experts that are separate linear layers, each computes its own rows')
        return torch.stack([layer(own) for layer, own in zip(self, rows, strict=True)])


class Experts(Switched):
    """E two-layer perceptrons with timm `Mlp`'s layout: fc1, act, drop, fc2, drop."""

    exchange: Any = None  # the `Exchange` with experts of other processes

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        hidden_features: int,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
        recompute: str | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.num_experts, self.recompute = num_experts, recompute
        self.fc1 = StackedLinear(num_experts, in_features, hidden_features, bias, **factory)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = StackedLinear(num_experts, hidden_features, in_features, bias, **factory)
        self.drop2 = nn.Dropout(drop)
        again = type(self.act) is nn.GELU and drop == 0
        check(again or not recompute, 'recompute', recompute, 'None, but with GELU and no dropout')

    def params_per_expert(self) -> int:
        """Parameters of one expert."""
        return sum(p.numel() for p in self.parameters()) // self.num_experts

    def plan(self, indices: Tensor, dtype: torch.dtype, dropped: bool = True) -> Plan:
        """Rows for assignments (A,) int64 in [0, E]; no expert computes E, those `dropped`."""
        if self.exchange is not None:  # rows that only fill a group need not travel
            return sorted_plan(indices, self.num_experts, dropped)
        return make_plan(indices, self.num_experts, dtype, dropped)

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        """Run expert e on rows ends[e - 1]:ends[e] of (R, D)."""
        exchange = self.exchange
        return exchange(self._run, rows, groups) if exchange else self._run(rows, groups)

    def evenly(self, rows: Tensor) -> Tensor:
        """Run expert e on rows[e] of (E, S, D): one batched product a layer, without a plan."""
        if self.exchange is not None:
            ends = rows.shape[1] * torch.arange(1, len(rows) + 1, device=rows.device)
            return self(rows.flatten(0, 1), Groups(ends.int(), full=True)).view(rows.shape)
        hidden, act = self.fc1.evenly(rows), cast(nn.GELU, self.act)
        if self.recompute:
            return self.fc2.evenly(hidden, act.approximate)
        return self.drop2(self.fc2.evenly(self.drop1(self.act(hidden))))

    def _run(self, rows: Tensor, groups: Groups) -> Tensor:
        widths = self.fc1.out_features, self.fc1.in_features
        groups = placed(groups, rows, (len(groups.ends), *widths))
        hidden = self.fc1(rows, groups)
        if self.recompute:  # GELU alone, and nothing drops
            return self.fc2(hidden, groups, self.act.approximate)
        return self.drop2(self.fc2(self.drop1(self.act(hidden)), groups))

    def separate(self) -> None:
        """Hold copies in `nn.Linear`s, `fc1.EXPERT.weight`, in place of stacked weights."""
        self.recompute = None  # they only predict
        for name, layer in list(self.named_children()):
            if isinstance(layer, StackedLinear):
                setattr(self, name, SeparateLinear(layer))
