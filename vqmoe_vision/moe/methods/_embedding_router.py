"""The router that tables published with VQMoE call StableMoE: one stage, embeddings of length one.

Preset 'group' of StableMoE. The tables' code, `CustomNaiveGate_Balance_StableMoE` of
giangdip2410/VQMoE, has neither the distillation nor the second stage of the method of that name.

Legend: T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TopKConfig
from ..routing import Routing, TopKRouter, full_precision, init_orthogonal, top_k_experts


class EmbeddingRouter(TopKRouter):
    """Softmax over the K best of E_i . x / |E_i|."""

    has_losses = False

    def __init__(self, in_features: int, config: TopKConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.expert_embed = nn.Parameter(torch.empty(config.num_experts, in_features, **factory))
        self.init_weights()

    def init_weights(self) -> None:
        """Orthogonal of gain 0.32, as the tables' code."""
        # no score depends on the length, but a step of the optimizer turns a longer embedding less
        init_orthogonal(self.expert_embed, gain=0.32)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens (T, D) in float32."""
        with full_precision(x):
            scores = F.linear(x.float(), F.normalize(self.expert_embed.float(), dim=-1))
            chosen, indices = top_k_experts(scores, self.config.top_k)
        return Routing(indices, chosen.softmax(dim=-1))

    def no_weight_decay(self) -> set[str]:
        """The expert embeddings: only their direction counts."""
        return {'expert_embed'}
