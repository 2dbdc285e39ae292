"""The nearest code of a token: the plain codebook of VQ-VAE, and SimVQ's.

Every codebook has, in float32 (VQ-VAE, arXiv 1711.00937):

    q = argmin_j |x - v_j|^2
    loss = codebook_scale * mean |sg[x] - v_q|^2 + commitment * mean |x - sg[v_q]|^2

With `use_cosine_sim` x and v are of length one in all of this (ViT-VQGAN, arXiv 2110.04627).

What learns without gradients learns in `update`, never in `forward`: under gradient checkpointing
the gradients would be wrong, silently.

Legend: T tokens, D width, M codes.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..routing import Switched, directions, full_precision

NORM_EPS = 1e-4  # shorter vectors have no direction, and would have a gradient without bound
TEMPERATURE = 0.1  # of soft assignments
_SHORTEST = 1e-6  # token that `rotate_to` can turn


@dataclass(frozen=True)
class Quantized:
    """Answer of a codebook."""

    codes: Tensor  # (T, D) float32, as long as the token with `use_cosine_sim`
    indices: Tensor  # (T,) int64 in [0, M)
    loss: Tensor  # 0-dim float32, unweighted
    error: Tensor  # 0-dim, mean squared distance of tokens and `codes` per channel; no gradient
    weights: Tensor | None = None  # (T, 1) float32, ones, with a gradient for the choice
    probs: Tensor | None = None  # (T, M) float32, of the choice


def nearest_code(x: Tensor, codes: Tensor, on: Tensor | None = None) -> Tensor:
    """Index (T,) of the nearest of codes (M, D) to tokens (T, D), float32; the first of equals."""
    # not `no_grad`: where it ends a region without autocast, a saved program loads no more
    x, codes = x.detach(), codes.detach()
    # |x|^2 is the same for every code; leaving it out makes this one matrix product
    distances = torch.addmm(codes.square().sum(dim=1), x, codes.t(), alpha=-2)
    if on is not None:  # (E,), code j is of expert j mod E
        distances = distances.masked_fill(~on.repeat(len(codes) // len(on)), torch.inf)
    return distances.argmin(dim=1)


class Codebook(Switched):
    """Plain codebook of VQ-VAE: uniform start in (-1 / M, 1 / M), learned by gradient."""

    # arguments beside the sizes, which are options of a method
    OPTIONS: ClassVar[tuple[str, ...]] = ('commitment', 'use_cosine_sim')
    codebook_scale = 1.0
    pending: Any = None  # `CodeUsage` that passes have left for the next `update`
    embed: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        commitment: float = 0.25,  # beta
        use_cosine_sim: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.num_codes, self.dim = num_codes, dim
        self.commitment, self.use_cosine_sim = commitment, use_cosine_sim
        self.frozen = False
        self._create(**factory)
        self.init_weights()

    def _create(self, **factory: Any) -> None:
        self.embed = nn.Parameter(torch.empty(self.num_codes, self.dim, **factory))

    def init_weights(self) -> None:
        """The paper's uniform start."""
        # collapses easily: tokens of transformers share a large mean, so that one code may win all
        nn.init.uniform_(self.embed, -1 / self.num_codes, 1 / self.num_codes)

    def _learned(self) -> Tensor:
        """(M, D) float32, of any length."""
        return self.embed.float()

    def codes(self) -> Tensor:
        """Current codes, (M, D) float32; of length one with `use_cosine_sim`."""
        return self.compared(self._learned())

    def compared(self, vectors: Tensor) -> Tensor:
        """Tokens or codes (..., D) as they are compared: of length one with `use_cosine_sim`."""
        return directions(vectors, NORM_EPS) if self.use_cosine_sim else vectors

    def no_weight_decay(self) -> set[str]:
        """The codes: decay would pull them away from the tokens."""
        return {'embed'}

    def forward(self, x: Tensor) -> Quantized:
        """Quantize tokens (T, D)."""
        with full_precision(x):
            x = x.float()
            compared, codes = self.compared(x), self.codes()
            indices = nearest_code(compared, codes, self.switches)
            # not codes[indices], whose backward is one thread's work: 12 ms at 8192 tokens, not 0.6
            chosen = codes.index_select(0, indices)
            error = _mean_squared(compared, chosen.detach())
            loss = self.commitment * error
            if self.codebook_scale > 0:
                loss = loss + self.codebook_scale * _mean_squared(chosen, compared.detach())
            if self.use_cosine_sim:
                chosen = self.as_long_as(x, chosen)
                error = _mean_squared(x, chosen)
        return Quantized(chosen, indices, loss, error.detach())

    def soft_assignment(self, x: Tensor) -> Tensor:
        """Probabilities of codes, softmax(-distance^2 / TEMPERATURE) over them, (T, M) float32."""
        with full_precision(x):
            # a copy: autograd keeps it, and an update may change codes before a later backward
            x, codes = self.compared(x.float()), self.codes().clone()
            # as `nearest_code`: |x|^2 is the same for every code
            distance = torch.addmm(codes.square().sum(dim=1), x, codes.t(), alpha=-2)
            # mean over channels, of directions the sum: for LayerNorm's tokens the same number
            channels = 1 if self.use_cosine_sim else self.dim
            return (distance / -(channels * TEMPERATURE)).softmax(dim=-1)

    def energy(self, x: Tensor) -> Tensor:
        """Return the mean square of tokens (T, D), which an error is relative to; 0-dim."""
        flat = x.detach().flatten()
        return torch.dot(flat, flat) / max(flat.shape[0], 1)

    def as_long_as(self, x: Tensor, codes: Tensor) -> Tensor:
        """What stands for tokens (..., D): their codes, with `use_cosine_sim` at their length."""
        if not self.use_cosine_sim:
            return codes
        return codes * torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)

    def freeze(self) -> None:
        """Keep the codes as they are; of the loss only the commitment is left."""
        self.requires_grad_(False)
        self.frozen, self.codebook_scale = True, 0.0

    def observe(self, x: Tensor, indices: Tensor, tokens_per_sample: int = 1) -> Tensor | None:
        """Keep what `update` needs of tokens (T, D), codes (T,); returns how many are left out."""
        return None

    def moves(self) -> bool:
        """Whether `update` is what the codes learn by, or one of the ways."""
        return not self.frozen and type(self).update is not Codebook.update

    def update(self) -> bool:
        """Learn from the observed passes of all ranks; returns whether the codes may change."""
        return False


def _mean_squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean over tokens and channels, zero without tokens."""
    return F.mse_loss(a, b, reduction='mean' if a.shape[0] > 0 else 'sum')


class SimVQCodebook(Codebook):
    """Frozen Gaussian codes seen through one learned linear layer (SimVQ, arXiv 2411.02038).

    The layer moves all codes together, so that few are left behind. It has no start from data: a
    large mean that all tokens share still lets one code win all.
    """

    frozen_embed: Tensor

    def _create(self, **factory: Any) -> None:
        self.register_buffer('frozen_embed', torch.empty(self.num_codes, self.dim, **factory))
        # float when the rest is int8: it decides
        self.project = NonDynamicallyQuantizableLinear(self.dim, self.dim, **factory)

    def init_weights(self) -> None:
        """Standard deviation D^-1/2 for the codes, torch's default for the layer."""
        nn.init.normal_(self.frozen_embed, std=self.dim**-0.5)
        self.project.reset_parameters()

    def _learned(self) -> Tensor:
        weight, bias = self.project.weight.float(), self.project.bias.float()
        return F.linear(self.frozen_embed.float(), weight, bias)

    def no_weight_decay(self) -> set[str]:
        """The projection: it is the codebook."""
        return {'project.weight'}


def rotate_to(x: Tensor, codes: Tensor) -> Tensor:
    """Codes (T, D), with the gradient of tokens (T, D) that are turned and stretched onto them.

    The rotation trick (arXiv 2410.06424, section 4.2): with directions x^ and v^, and w of the
    direction of x^ + v^, v = s R x, s = norm(v) / norm(x) and R = I - 2 w w^T + 2 v^ x^^T, where s
    and R are constants. A token of no length has its gradient straight through.
    """
    if not x.requires_grad:
        return codes
    with full_precision(x):
        tokens, v = x.detach().float(), codes.float()
        length = torch.linalg.vector_norm(tokens, dim=1, keepdim=True)
        start, end = F.normalize(tokens, dim=1), F.normalize(v, dim=1)
        middle = F.normalize(start + end, dim=1)
        # zero: the value is the code itself, without the rounding errors of a rotation
        zero = x.float() - tokens
        across = torch.linalg.vecdot(zero, middle)[:, None] * middle
        along = torch.linalg.vecdot(zero, start)[:, None] * end
        stretch = torch.linalg.vector_norm(v, dim=1, keepdim=True) / length.clamp(min=_SHORTEST)
        turned = stretch * (zero - 2 * across + 2 * along)
        return (v + torch.where(length > _SHORTEST, turned, zero)).to(x.dtype)
