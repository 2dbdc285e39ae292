"""SimVQ's codebook: one learned layer moves all codes together, so that few are left behind.

It has no start from data: a large mean that all tokens share still lets one code win all.

Legend: D width, M codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .codebook import Codebook


class SimVQCodebook(Codebook):
    """Frozen Gaussian codes seen through one learned linear layer (SimVQ, arXiv 2411.02038)."""

    frozen_embed: Tensor

    def _create(self) -> None:
        self.register_buffer('frozen_embed', torch.empty(self.num_codes, self.dim, **self.factory))
        # float when the rest is int8: it decides
        self.project = NonDynamicallyQuantizableLinear(self.dim, self.dim, **self.factory)

    def init_weights(self) -> None:
        """Standard deviation D^-1/2 for the codes, torch's default for the layer."""
        nn.init.normal_(self.frozen_embed, std=self.dim**-0.5)
        self.project.reset_parameters()

    def _learned(self) -> Tensor:
        """Projected codes, (M, D) float32."""
        weight, bias = self.project.weight.float(), self.project.bias.float()
        return F.linear(self.frozen_embed.float(), weight, bias)

    def no_weight_decay(self) -> set[str]:
        """The projection: it is the codebook."""
        return {'project.weight'}
