"""The rotation trick: a gradient through vector quantization that knows where the code lies.

Legend: T tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import full_precision

_SHORTEST = 1e-6


def rotate_to(x: Tensor, codes: Tensor) -> Tensor:
    """Codes, with the gradient of tokens that are turned and stretched onto them."""
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
