"""The discrete branch of VQMoE (arXiv 2411.19402, equation 3) up to its expert, and its readings.

The paper feeds the code v itself to the expert. The authors' code feeds almost the token x, and
lets the code decide only which expert. `expert_input` has both and more, with c = `code_share`:

    'mix'       (1 - c) x + c v     gradient 1 with respect to x
    'ste'       v                   'mix' with c = 1: equation (3), straight through
    'token'     x                   'mix' with c = 0: the code is only an index
    'official'  (1 - 2c) x + c v    the value and gradient (1 - c) of the authors' code

Gradients are straight through the code: as if v were x. With `rotation_trick` v has the gradient of
x turned onto it, see `moe/rotation.py`.

Legend: T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..codebook import Codebook, Quantized
from ..rotation import rotate_to
from ..routing import expert_load

EXPERT_INPUTS = ('mix', 'ste', 'token', 'official')
FIXED_SHARES = {'ste': 1.0, 'token': 0.0}


class Quantizer(nn.Module):
    """Tokens to their codes, and to what an expert is fed."""

    codebook: Codebook

    def __init__(
        self,
        codebook: Codebook,
        norm: nn.Module,
        reading: str,
        code_share: float,
        rotation_trick: bool = False,
    ) -> None:
        super().__init__()
        self.codebook = codebook
        self.norm = norm
        self.reading = reading
        self.code_share = FIXED_SHARES.get(reading, code_share)
        self.rotation_trick = rotation_trick

    def forward(self, x: Tensor, precise: Tensor) -> tuple[Tensor, Quantized]:
        """Quantize tokens (T, D), and the same in float32; first comes what the expert is fed."""
        quantized = self.codebook(precise)
        return self.norm(self.expert_input(x, quantized.codes.to(x.dtype))), quantized

    def expert_input(self, x: Tensor, code: Tensor) -> Tensor:
        """What the expert is fed for tokens (T, D) and their codes (T, D), before the norm."""
        share = self.code_share
        if share == 0:
            return x
        if self.rotation_trick:
            of_token = 1 - 2 * share if self.reading == 'official' else 1 - share
            return torch.add(of_token * x, rotate_to(x, code.detach()), alpha=share)
        if share == 1 and self.reading != 'official':
            # exactly the code, in half precision too, and the gradient of the token
            return code.detach() + (x - x.detach())
        kept = (1 - share) * x if self.reading == 'official' else x
        return torch.add(kept, (code - x).detach(), alpha=share)

    def observe(
        self, tokens: Tensor, quantized: Quantized, tokens_per_image: int
    ) -> dict[str, Tensor]:
        """Statistics of tokens (T, D) float32; a codebook in training sees them."""
        energy = torch.linalg.vector_norm(tokens.detach()).square()
        stats = {
            'code_usage': expert_load(quantized.indices, self.codebook.num_codes),
            # of the tokens' energy
            'quantization_error': quantized.error * tokens.numel() / energy.clamp(min=1e-12),
        }
        learns = self.training and not self.codebook.frozen
        if not learns:
            return stats
        left_out = self.codebook.observe(tokens, quantized.indices, tokens_per_image)
        return stats if left_out is None else {**stats, 'nonfinite_tokens': left_out}
