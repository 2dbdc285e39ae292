"""The continuous branch of VQMoE (arXiv 2411.19402, equation 2): SMoE's router with one expert.

The weight of (2) is a probability, 0.36 of eight experts at the start where a code's expert has 1.
`routed_scaling_factor` evens that, as in DeepSeek-V2 (arXiv 2405.04434), which does not renormalise
either: renormalised, one weight is 1, as if the router were not trained.

Legend: T tokens, D width, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..routing import Routing
from .smoe import SMoEConfig, SMoERouter


class ContinuousRouter(SMoERouter):
    """SMoE's router with one expert and without noise; weight one if it is not trained."""

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        balance_weight: float,
        global_balance: bool,
        trained: bool,
        scale: float = 1.0,
        **factory: Any,
    ) -> None:
        config = SMoEConfig(
            num_experts=num_experts,
            top_k=1,
            router_noise=0.0,
            importance_weight=0.0,
            load_weight=0.0,
            balance_weight=balance_weight,
            global_balance=global_balance,
            train_router=trained,
        )
        super().__init__(in_features, config, **factory)
        self.scale = scale

    def forward(self, x: Tensor) -> Routing:
        """Route tokens (T, D) in float32."""
        routing = super().forward(x)
        if not self.config.train_router:
            return replace(routing, weights=torch.ones_like(routing.weights))
        if self.scale == 1:
            return routing
        return replace(routing, weights=self.scale * routing.weights)
