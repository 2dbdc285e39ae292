"""Tokens and routings of a cell, new ones for every round.

Every round has its own routing: the CPU's bfloat16 products compile a kernel for each new number of
rows, a cost of real training that a fixed routing would hide.

Legend: B images, N tokens per image, T = B * N, D width, E experts, K experts per token.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cells import Cell

PATCH = 8  # pixels of the patches behind the tokens, which stand in one row


@dataclass(frozen=True)
class Batch:
    """What one step computes on."""

    x: Tensor
    indices: Tensor
    weights: Tensor
    images: Tensor
    decided: dict = field(default_factory=dict)  # what a layer did with it, where that is given

    def double(self) -> 'Batch':
        """The same in float64, new leaves."""
        x, weights = (t.detach().double().requires_grad_() for t in (self.x, self.weights))
        return Batch(x, self.indices, weights, self.images, self.decided)

    def clear(self) -> None:
        self.x.grad = self.weights.grad = None


def skewed_routing(cell: Cell, generator: torch.Generator, full: int = 0) -> Tensor:
    """Choices (T, K) of which one expert gets `skew` times the mean load, the others the rest."""
    scores = torch.rand(cell.num_tokens, cell.experts, generator=generator)
    load = round(cell.skew * cell.num_rows / cell.experts)
    chosen = torch.randperm(cell.num_tokens, generator=generator)[:load]
    scores[:, full] = -1.0  # last choice of most, first of the chosen
    scores[chosen, full] = 2.0
    return scores.topk(cell.top_k, dim=-1).indices


class Inputs:
    """Makes the batches of a cell; the same round is always the same batch."""

    def __init__(self, cell: Cell, device: str = 'cpu') -> None:
        self.cell, self.device = cell, device
        generator = torch.Generator().manual_seed(0)
        shape = (cell.batch, cell.tokens, cell.width)
        tokens = torch.randn(shape, generator=generator)
        self.tokens = tokens.to(device=device, dtype=cell.param_dtype)
        self._last: tuple[int, Batch] | None = None

    def batch(self, index: int) -> Batch:
        """Batch of a round, made once for all contenders."""
        if self._last is None or self._last[0] != index:
            self._last = (index, self._make(index))
        return self._last[1]

    def _make(self, index: int) -> Batch:
        cell = self.cell
        generator = torch.Generator().manual_seed(index + 1)
        # other signs of the features: tokens that a router has not seen, at the price of a product
        signs = torch.randint(0, 2, (cell.width,), generator=generator) * 2 - 1
        x = (self.tokens * signs.to(self.tokens)).requires_grad_()
        indices = skewed_routing(cell, generator, full=index % cell.experts).to(self.device)
        logits = torch.randn(cell.num_tokens, cell.top_k, generator=generator)
        weights = logits.softmax(dim=-1) if cell.top_k > 1 else logits.sigmoid()
        shape = (cell.batch, 3, PATCH, PATCH * cell.tokens)
        images = torch.randn(shape, generator=generator).to(self.device)
        return Batch(x, indices, weights.to(self.device).requires_grad_(), images)
