"""Hash routing: a token's experts follow from its position, and nothing is learned.

"Hash Layers For Large Sparse Models" (Roller et al., NeurIPS 2021, arXiv 2106.04426), for token
t = 1 .. N of one image:

    y_t = f_hash(t)(x_t)                                 no gate, no auxiliary loss

It is the control that a learned router has to beat: same experts, same compute, no decision. The
paper hashes words, and among others positions; a patch has no identity but its position. Each block
of E positions has every expert once as its first, so that loads of first experts differ by one
token at most ('balanced hash'). Further ones are drawn freely.

Where we differ: K experts per token, different ones, have their answers averaged; the paper's
MultiHash cuts one expert into K pieces. Positions repeat after 4,096 tokens.

Legend: B images, N tokens per image, T = B * N, D width, E experts, K experts per token.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import Named, TopKConfig
from ..raw_patches import Host
from ..routing import Routing, TopKRouter
from ..valid import ValidTokens

POSITIONS = 4096


@dataclass(frozen=True, kw_only=True)
class HashConfig(TopKConfig):
    """Options of hash routing."""

    # K equal answers are averaged
    EXACT_UPCYCLING: ClassVar[Named] = {'any': {}}

    learns_routing = False  # a hash is drawn once


class HashRouter(TopKRouter):
    """Experts by position."""

    per_image = True
    has_losses = False
    permutation_equivariant = False
    hash: Tensor  # (4096, K) int64, experts of every position; another draw per layer

    def __init__(
        self, in_features: int, config: HashConfig, host: Host | None = None, **factory: Any
    ) -> None:
        super().__init__()
        self.config = config
        shape, device = (POSITIONS, config.top_k), factory.get('device')
        self.register_buffer('hash', torch.empty(shape, dtype=torch.int64, device=device))
        self.init_weights()

    def init_weights(self) -> None:
        """Draws the hash; every block of E positions has each expert first once."""
        num_experts = self.config.num_experts
        # the ranks of random numbers are a random order
        blocks = torch.rand(-(-POSITIONS // num_experts), num_experts, device=self.hash.device)
        first = blocks.argsort(dim=1).flatten()[:POSITIONS, None]
        others = torch.rand(POSITIONS, num_experts - 1, device=self.hash.device).argsort(dim=1) + 1
        steps = torch.cat([torch.zeros_like(first), others[:, : self.config.top_k - 1]], dim=1)
        self.hash.copy_((first + steps) % num_experts)

    def forward(self, x: Tensor, valid: ValidTokens | None = None) -> Routing:
        """Route images (B, N, D), or of a padded batch the tokens that are there."""
        batch, num_tokens, _ = x.shape
        positions = torch.arange(num_tokens, device=x.device) % POSITIONS
        indices = self.hash[positions].repeat(batch, 1)
        if valid is not None:
            indices = indices.index_select(0, valid.places)
        weights = torch.full_like(indices, 1 / self.config.top_k, dtype=torch.float32)
        return Routing(indices, weights)
