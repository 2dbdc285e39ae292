"""Loss-free balancing (Wang et al., arXiv 2408.15664, algorithm 1): a bias on who is chosen.

For gates s_t,i of token t, and c_i assignments to expert i in all passes and processes of a step:

    chosen = TopK_i(s_t,i + b_i),  weights s_t,i        the bias gets and gives no gradient
    b_i <- b_i + u sign(mean_j c_j - c_i)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import MoeConfig, option
from .routing import ExactBuffers, Routing, TopKRouter, top_k_experts


@dataclass(frozen=True, kw_only=True)
class LossFreeConfig(MoeConfig):
    """Options of loss-free balancing: `bias_update_rate` is u, at least 0; 0 has no bias."""

    bias_update_rate: float = option(0.0, 0.01, bounds='[0, inf)', of_weights=False)


class LossFreeRouter(ExactBuffers, TopKRouter):
    """Base of routers whose choice has a bias, (E,) float32, if its rate is above 0."""

    exact_buffers = ('choice_bias',)
    choice_bias: Tensor

    def __init__(self, num_experts: int, rate: float, device: Any = None) -> None:
        super().__init__()
        self.bias_update_rate, self.has_state = rate, rate > 0
        if self.has_state:
            self.register_buffer('choice_bias', torch.empty(num_experts, device=device).float())

    def init_weights(self) -> None:
        """No bias; a subclass draws its weights too."""
        if self.has_state:
            self.choice_bias.zero_()

    def choose(self, scores: Tensor, gates: Tensor) -> Tensor:
        """Experts (T, K) by gates (T, E) and the bias; without one by scores of the same order."""
        ranked = gates + self.choice_bias if self.has_state else scores
        return top_k_experts(ranked, self.config.top_k)[1]

    def observe(self, routing: Routing) -> Tensor:
        """Assignments of each expert, (E,) int64."""
        experts = torch.arange(len(self.choice_bias), device=routing.indices.device)
        return (routing.indices.flatten()[:, None] == experts).sum(dim=0)

    def update(self, observed: Tensor) -> bool:
        """Move the bias towards experts with less than the mean."""
        self.choice_bias += self.bias_update_rate * (observed.float().mean() - observed).sign()
        return True
