"""Expert choice: every expert takes its best tokens, a token has any number of experts.

"Mixture-of-Experts with Expert Choice Routing" (Zhou et al., NeurIPS 2022, arXiv 2202.09368), for
tokens X (N, D) of one image, numbered as there:

    (1)  k = N c / E                                    c: `capacity_factor`
    (2)  S = softmax(X W_g) over experts,  G, I = TopK(S^T, k) over tokens
    (3)  y_t = sum over experts i that chose t of G_i,t f_i(x_t)

Loads are even by construction: there is no auxiliary loss. A token that no expert takes, maybe the
class token, is left to the residual connection.

Where we differ: each image is a group of its own, so that an answer does not depend on the rest of
the batch; the paper's groups are batches of sentences. k is rounded, and at least one token. The
paper's limit on the experts of a token is not offered.

Legend: B images, N tokens per image, D width, E experts, C tokens per expert and image (k above).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MoeConfig, Named, option
from ..raw_patches import Host
from ..routing import Router, Routing, full_precision, init_lecun_normal
from ..valid import ValidTokens, positions


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceConfig(MoeConfig):
    """Options of expert choice.

    Args:
        capacity_factor: Experts per token on average, at most all.
    """

    # Weights of a token sum to 1 over all experts: every expert has to take every token, which
    # costs them all.
    EXACT_UPCYCLING: ClassVar[Named] = {'all': {'num_experts': 2, 'capacity_factor': 2.0}}

    capacity_factor: float = option(2.0, 1.0, bounds='(0, inf)')

    def __post_init__(self) -> None:
        super().__post_init__()
        possible = self.capacity_factor <= self.num_experts
        self.require('capacity_factor', possible, f'at most num_experts={self.num_experts}')


class ExpertChoiceRouter(Router):
    """Chooses tokens for every expert, expert choice (1) and (2)."""

    per_image = True
    has_losses = False

    def __init__(
        self, in_features: int, config: ExpertChoiceConfig, host: Host, **factory: Any
    ) -> None:
        super().__init__()
        self.config, self.num_tokens = config, host.num_tokens
        self.weight = nn.Parameter(torch.empty(config.num_experts, in_features, **factory))
        self.init_weights()

    def init_weights(self) -> None:
        """As V-MoE's router; the paper does not say."""
        init_lecun_normal(self.weight)

    def set_num_tokens(self, num_tokens: int) -> None:
        """Hear of another size of images; what is computed goes by the tokens that come."""
        self.num_tokens = num_tokens

    def forward(self, x: Tensor, valid: ValidTokens | None = None) -> Routing:
        """Route images (B, N, D) in float32, or of a padded batch the tokens that are there."""
        batch, num_tokens, _ = x.shape
        if torch.jit.is_tracing():  # sizes are tensors then
            num_tokens = int(num_tokens)
        with full_precision(x):
            probs = self.among_on(F.linear(x.float(), self.weight.float())).softmax(dim=-1)
            if valid is not None:
                probs = probs.masked_fill(~valid.mask[:, :, None], -1)  # behind all others
            chosen = probs.transpose(1, 2).topk(self._capacity(num_tokens), dim=-1)  # (B, E, C)
        first = torch.arange(batch, device=x.device)[:, None, None] * num_tokens
        experts = torch.arange(self.config.num_experts, device=x.device)[:, None]
        parts = [experts.expand_as(chosen.indices), chosen.values, first + chosen.indices]
        if valid is None:
            # those of an expert stand together
            indices, weights, tokens = (part.transpose(0, 1).flatten() for part in parts)
        else:
            own = self._own_choices(valid, chosen.values.shape)
            indices, weights, padded = (part.flatten().index_select(0, own) for part in parts)
            tokens = (valid.mask.flatten().cumsum(0) - 1).index_select(0, padded)
        return Routing(indices=indices, weights=weights, tokens=tokens, even=valid is None)

    def _own_choices(self, valid: ValidTokens, shape: torch.Size) -> Tensor:
        """Which of choices (B, E, C) experts have in images of their own numbers of tokens."""
        number = sum(min(self._capacity(tokens), tokens) for tokens in valid.numbers)
        # the same on the device, to which nothing has to travel
        tokens = valid.mask.sum(dim=1).double()
        per_expert = tokens * self.config.capacity_factor / self.config.num_experts
        capacity = per_expert.round().clamp(min=1).minimum(tokens)
        own = torch.arange(shape[2], device=tokens.device) < capacity[:, None, None]
        return positions(own.expand(shape), shape[1] * number)

    @property
    def experts_per_token(self) -> float:
        """The capacity factor, but for what rounding to whole tokens per expert changes."""
        return self.config.num_experts * self._capacity(self.num_tokens) / self.num_tokens

    def _capacity(self, num_tokens: int) -> int:
        """Tokens that an expert chooses of an image, (2)."""
        return max(round(num_tokens * self.config.capacity_factor / self.config.num_experts), 1)
