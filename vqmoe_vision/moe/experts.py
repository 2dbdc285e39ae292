"""Experts as one stacked parameter per weight.

Legend: A assignments, R rows sorted by expert, E experts, S rows of each, D width, H hidden width.

Stacked, not a ModuleList: an expert that no token chose has a zero gradient instead of none, which
data-parallel training and timm's test suite need.
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GELU, GELUTanh
from torch import Tensor, nn

from .config import check
from .kernels import Groups, Plan, even_linear, grouped_linear, make_plan, placed, refuse_named
from .kernels.cpu import sorted_plan
from .routing import Switched


class Stacked(nn.Module):
    """Parameters that have the experts as their first dimension."""

    stacks_experts = True  # what `per_expert` looks for
    own: Callable[[Any], Tensor] = staticmethod(lambda whole: whole)  # takes this process's part


def gelu_approximation(act: nn.Module) -> str | None:
    """Return `approximate` of `F.gelu` for torch's or timm's GELU, None for others."""
    of_timm = {GELU: 'none', GELUTanh: 'tanh'}
    return act.approximate if type(act) is nn.GELU else of_timm.get(type(act))


class StackedNorm(Stacked):
    """E layer norms of rows, whose scales and shifts the linear layers behind them take over."""

    def __init__(self, num_experts: int, features: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(num_experts, features, **factory))
        self.bias = nn.Parameter(torch.empty(num_experts, features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As those of any norm."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def layer(self, expert: int) -> nn.LayerNorm:
        """One of them, with copies of its parameters."""
        norm = nn.LayerNorm(self.weight.shape[1:], self.eps, device='meta')
        for name, whole in self.named_parameters():
            setattr(norm, name, nn.Parameter(whole[expert].detach().clone(), whole.requires_grad))
        return norm

    def no_weight_decay(self) -> set[str]:
        """Both, which optimizers know by their single dimension elsewhere."""
        return {'weight', 'bias'}

    def forward(self, rows: Tensor) -> Tensor:
        """What all of them have in common, on rows (..., H)."""
        return F.layer_norm(rows, rows.shape[-1:], eps=self.eps)

    def within(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rest, within the weight (E, D, H) and bias (E, D) of a linear layer."""
        # by row it would be two gathers as large as the hidden layer, and a scatter backward
        scale, shift = self.own(self.weight)[:, None], self.own(self.bias)[:, None]
        shifted = (weight * shift).sum(dim=-1)
        return weight * scale, shifted if bias is None else bias + shifted


class StackedLinear(Stacked):
    """E linear layers, applied to consecutive groups of rows."""

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

    def forward(
        self,
        rows: Tensor,
        groups: Groups,
        gelu: str | None = None,
        norm: StackedNorm | None = None,
    ) -> Tensor:
        """Apply layer e to rows ends[e - 1]:ends[e], or to GELU's or a norm's answers for them.

        Rows past the last end give zero.
        """
        rows = rows if norm is None else norm(rows)
        return grouped_linear(rows, *self._parts(norm), groups, gelu)

    def one(
        self, expert: int, rows: Tensor, gelu: str | None = None, norm: StackedNorm | None = None
    ) -> Tensor:
        """Apply one layer to rows (R, in), maybe none, in operators that every runtime has."""
        rows = rows if gelu is None else F.gelu(rows, approximate=gelu)
        if norm is not None:
            own = norm.weight[expert], norm.bias[expert]
            rows = F.layer_norm(rows, rows.shape[-1:], *own, norm.eps)
        return F.linear(rows, self.weight[expert], None if self.bias is None else self.bias[expert])

    def evenly(
        self, rows: Tensor, gelu: str | None = None, norm: StackedNorm | None = None
    ) -> Tensor:
        """Apply each layer to its own rows (E, S, in), in operators that every runtime has."""
        rows = rows if norm is None else norm(rows)
        return even_linear(rows, *self._parts(norm), gelu)

    def _parts(self, norm: StackedNorm | None) -> tuple[Tensor, Tensor | None]:
        own = self.own(self.weight), None if self.bias is None else self.own(self.bias)
        return own if norm is None else norm.within(*own)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f'num_experts={self.weight.shape[0]}, {self.in_features} -> {self.out_features}'


class SeparateLinear(nn.ModuleList):
    """The layers of a `StackedLinear` as E modules `nn.Linear`, which other tools look for."""

    def __init__(self, stacked: StackedLinear, norm: StackedNorm | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = stacked.in_features, stacked.out_features
        for expert in range(len(stacked.weight)):
            layer: nn.Module = copy.deepcopy(stacked.layer(expert))
            layer = layer if norm is None else nn.Sequential(norm.layer(expert), layer)
            self.append(layer.train(stacked.training))

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
    """E two-layer perceptrons with the layout and names of timm's `Mlp`, `GluMlp` or `SwiGLU`.

    Args:
        num_experts: E.
        in_features: D.
        hidden_features: H, which the second layer reads.
        act_layer: Activation of the hidden layer, or of its gate.
        bias: Of both layers.
        drop: Rate of both.
        recompute: As of `MoeConfig`.
        gate: None; 'first' or 'last', where the gate stands in the answers of `fc1`, (..., 2 H);
            'separate' for one of layers of their own, `fc1_g` beside `fc1_x`.
        norm_eps: Of a layer norm before the second layer; None for no norm.
    """

    exchange: Any = None  # the `Exchange` with experts of other processes
    fc1: StackedLinear  # in place of it `fc1_g` and `fc1_x` where the gate is separate

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        hidden_features: int,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
        recompute: str | None = None,
        gate: str | None = None,
        norm_eps: float | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.num_experts, self.recompute, self.gate = num_experts, recompute, gate
        width = 2 * hidden_features if gate in ('first', 'last') else hidden_features
        self.first = ('fc1_g', 'fc1_x') if gate == 'separate' else ('fc1',)
        for name in self.first:
            setattr(self, name, StackedLinear(num_experts, in_features, width, bias, **factory))
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = None
        if norm_eps is not None:
            self.norm = StackedNorm(num_experts, hidden_features, norm_eps, **factory)
        self.fc2 = StackedLinear(num_experts, hidden_features, in_features, bias, **factory)
        self.drop2 = nn.Dropout(drop)
        is_gelu = gelu_approximation(self.act) is not None
        possible = is_gelu and drop == 0 and gate is None and norm_eps is None
        allowed = "None, but with torch's or timm's GELU and neither gate, norm nor dropout"
        check(possible or not recompute, 'recompute', recompute, allowed)

    def first_layers(self) -> list[StackedLinear]:
        """Those that read the tokens; that of a gate comes first."""
        return [getattr(self, name) for name in self.first]

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
        return self._through(rows, lambda layer, x, **how: layer.evenly(x, **how))

    def one(self, expert: int, rows: Tensor) -> Tensor:
        """Run one expert on rows (R, D), maybe none, in operators that every runtime has."""
        return self._through(rows, lambda layer, x, **how: layer.one(expert, x, **how))

    def _run(self, rows: Tensor, groups: Groups) -> Tensor:
        # what suits half of a gated layer suits all of it
        widths = self.fc2.in_features, self.fc2.out_features
        groups = placed(groups, rows, (len(groups.ends), *widths))
        return self._through(rows, lambda layer, x, **how: layer(x, groups, **how))

    def _through(self, rows: Tensor, apply: Callable[..., Tensor]) -> Tensor:
        """Both layers, each by `apply`."""
        parts = [apply(layer, rows) for layer in self.first_layers()]
        if self.recompute:  # GELU alone, and nothing drops
            return apply(self.fc2, *parts, gelu=gelu_approximation(self.act))
        if self.gate is None:
            hidden = self.act(*parts)
        else:
            gate, hidden = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
            if self.gate == 'last':
                gate, hidden = hidden, gate
            hidden = self.act(gate) * hidden
        how = {} if self.norm is None else {'norm': self.norm}
        return self.drop2(apply(self.fc2, self.drop1(hidden), **how))

    def separate(self) -> None:
        """Hold copies in `nn.Linear`s, `fc1.EXPERT.weight`, in place of stacked weights."""
        self.recompute = None  # they only predict
        for name, layer in list(self.named_children()):
            if isinstance(layer, StackedLinear):
                setattr(self, name, SeparateLinear(layer, self.norm if name == 'fc2' else None))
        self.norm = None  # a part of those layers
