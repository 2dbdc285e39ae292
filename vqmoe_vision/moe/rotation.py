"""The rotation trick (arXiv 2410.06424, section 4.2): a gradient that knows where the code lies.

With directions x^ and v^, and w of the direction of x^ + v^:

    v = s R x,  s = norm(v) / norm(x),  R = I - 2 w w^T + 2 v^ x^^T

where s and R are constants: a gradient keeps its angle to the code as its angle to the token.
Straight through, it would be the same for all tokens of a code. So it is for a token of no length.

Legend: T tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import full_precision

_SHORTEST = 1e-6


def rotate_to(x: Tensor, codes: Tensor) -> Tensor:
    """Codes (T, D), with the gradient of tokens (T, D) that are turned and stretched onto them."""
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
