"""Codes in a space of few channels, which learns what the task asks of a choice.

A token x is projected, and its code is the nearest by angle, as XMoE chooses experts (arXiv
2204.09179, 5 and 6):

    z = W x,   q = argmax_j cos(z, v_j),   p = softmax(cos(z, v) / TEMPERATURE)

The weight of the code's expert is p_q / sg(p_q). Its value is 1, so that VQMoE's (4) and (5) hold
as they are, and its gradient is that of log p_q: it moves W and the codes to where the answer of
the expert helps. Codes of the tokens themselves find the directions of most variance, which need
not be those that the task needs.

Legend: T tokens, D width, R channels of the space, M codes, E experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from ..routing import directions, full_precision, init_orthogonal
from . import NORM_EPS, Codebook, Quantized

_TEMPERATURE = 0.3  # the one that XMoE starts from


class ProjectedCodebook(Codebook):
    """Codes on the sphere of a learned projection, learned by the gradient of the task.

    Args:
        num_codes: M.
        dim: D.
        code_dim: R.
        **factory: Device and dtype of the parameters.
    """

    OPTIONS = ('code_dim',)
    codebook_scale = 0.0

    def __init__(self, num_codes: int, dim: int, code_dim: int = 24, **factory: Any) -> None:
        self.code_dim = code_dim  # `_create`, which the base calls, needs it
        super().__init__(num_codes, dim, commitment=0.0, use_cosine_sim=True, **factory)

    @override
    def _create(self, **factory: Any) -> None:
        self.project = nn.Parameter(torch.empty(self.code_dim, self.dim, **factory))
        self.embed = nn.Parameter(torch.empty(self.num_codes, self.code_dim, **factory))

    @override
    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.project, std=0.02)
        init_orthogonal(self.embed)
        with (
            torch.no_grad()
        ):  # of the length that XMoE's have, which says how far a step turns them
            self.embed.copy_(1.5 * F.normalize(self.embed.float(), dim=-1))

    @override
    def compared(self, vectors: Tensor) -> Tensor:
        if vectors.shape[-1] == self.dim:
            vectors = F.linear(vectors, self.project.to(vectors))
        return directions(vectors, NORM_EPS)

    @override
    def codes(self) -> Tensor:
        return directions(self._learned(), NORM_EPS)

    @override
    def energy(self, x: Tensor) -> Tensor:
        return torch.ones((), device=x.device)

    def cosines(self, x: Tensor) -> Tensor:
        """Return the cosine of every token (T, D) with every code, (T, M) float32."""
        return F.linear(self.compared(x.float()), self.codes())

    @override
    def forward(self, x: Tensor) -> Quantized:
        with full_precision(x):
            cosines = self.cosines(x)
            if self.switches is not None:  # code j is of expert j mod E
                off = ~self.switches.repeat(self.num_codes // len(self.switches))
                cosines = cosines.masked_fill(off, -1e30)
            probs = (cosines / _TEMPERATURE).softmax(dim=-1)
            indices = cosines.argmax(dim=-1)
            chosen = probs.gather(1, indices[:, None])
            nearest = cosines.detach().gather(1, indices[:, None])
            # of vectors of length one |z - v|^2 = 2 - 2 cos(z, v)
            error = (2 - 2 * nearest).sum() / max(x.shape[0], 1)
            # never 0 / 0: the largest of M probabilities is at least 1 / M
            weights = chosen / chosen.detach()
        return Quantized(x, indices, error.new_zeros(()), error, weights, probs)

    @override
    def soft_assignment(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return (self.cosines(x) / _TEMPERATURE).softmax(dim=-1)

    @override
    def as_long_as(self, x: Tensor, codes: Tensor) -> Tensor:
        # the shortest token whose projection is the code, at the length of the token's projection
        project = self.project.detach().to(x)
        length = torch.linalg.vector_norm(F.linear(x, project), dim=-1, keepdim=True)
        return F.linear(length * codes, torch.linalg.pinv(project))

    @override
    def no_weight_decay(self) -> set[str]:
        return {'embed'}
