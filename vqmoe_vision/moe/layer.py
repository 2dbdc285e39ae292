"""The MoE layer of every method that is 'make a Routing, then run the experts'.

Legend: B images, N tokens per image, T = B * N, D width.
"""

from __future__ import annotations

from torch import Tensor

from .collect import MoeLayer
from .dispatch import run_experts
from .experts import Experts
from .routing import Router, Routing, expert_load


class RoutedMlp(MoeLayer):
    """Drop-in for timm's `Mlp` whose tokens are sent to experts by a router.

    Prefix tokens (class, registers) are routed like all others.

    Args:
        router: Tokens (T, D) to `Routing`.
        experts: The experts.
    """

    router: Router

    def __init__(self, router: Router, experts: Experts) -> None:
        super().__init__()
        self.router = router
        self.experts = experts

    def compute(self, x: Tensor) -> Tensor:
        """Route, run, report; (B, N, D) -> (B, N, D)."""
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens)
        out = run_experts(self.experts, tokens, routing.indices, routing.weights, routing.kept)
        record_routing(self, routing, self.experts.num_experts)
        return out.view(x.shape)

    def macs(self, num_tokens: int) -> int:
        """Router and K experts for every token."""
        per_token = self.router.config.top_k * self.experts.macs_per_row()
        return num_tokens * (self.router.macs_per_token() + per_token)

    def idle_params(self) -> int:
        """All but K experts."""
        idle = self.experts.num_experts - self.router.config.top_k
        return idle * self.experts.params_per_expert()


def record_routing(layer: MoeLayer, routing: Routing, num_experts: int) -> None:
    """Report the losses of a routing, and its load if somebody listens.

    Args:
        layer: Whose routing it is.
        routing: The routing.
        num_experts: E.
    """
    stats = routing.stats
    if layer.recorder.active:
        stats = {'load': expert_load(routing.indices, num_experts), **stats}
    layer.record(routing.losses, stats)
