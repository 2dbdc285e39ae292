"""The distilled router of StableMoE (arXiv 2204.08396, equation 6): raw patches in, scores out.

It has no bias, as the authors' code, and so learns first what tells most patches apart: brightness.

The frozen router is a copy kept in buffers. Parameters themselves cannot be frozen: momentum and
weight decay move one whose gradient is zero, and one without breaks data-parallel training.

Legend: B images, L patches per image, F = 16 * channels raw features of a patch, W = 50 distilled
width, G prefix tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..routing import init_orthogonal

CELLS = 4  # a patch is averaged to CELLS x CELLS cells before D sees it
DISTILLED_WIDTH = 50  # of the paper


def read_patches(images: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Average patches to 4 x 4 cells, (B, channels, height, width) -> (B, L, F) without a graph."""
    rows, columns = grid_size
    cells = F.adaptive_avg_pool2d(images.detach(), (rows * CELLS, columns * CELLS))
    # not pixel_unshuffle, which leaves an empty batch in the shape it came in
    return F.unfold(cells, CELLS, stride=CELLS).transpose(1, 2)


class DistilledRouter(nn.Module):
    """D and E^ of (6), with their frozen copy."""

    project: Tensor
    prefix: Tensor
    expert_embed: Tensor
    frozen: Tensor
    steps: Tensor

    def __init__(
        self, in_chans: int, num_experts: int, num_prefix_tokens: int, **factory: Any
    ) -> None:
        super().__init__()
        shapes = {
            'project': (DISTILLED_WIDTH, in_chans * CELLS * CELLS),
            'prefix': (num_prefix_tokens, DISTILLED_WIDTH),
            'expert_embed': (num_experts, DISTILLED_WIDTH),
        }
        self.names = [name for name, shape in shapes.items() if shape[0] > 0]
        for name in self.names:
            self.register_parameter(name, nn.Parameter(torch.empty(shapes[name], **factory)))
            self.register_buffer(f'frozen_{name}', torch.empty(shapes[name], **factory))
        device = factory.get('device')
        self.register_buffer('frozen', torch.empty((), dtype=torch.bool, device=device))
        self.register_buffer('steps', torch.empty((), dtype=torch.int64, device=device))
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layer as timm's, prefix of 0.02, experts orthogonal with gain 0.1; stage 1."""
        nn.init.trunc_normal_(self.project, std=0.02)
        if 'prefix' in self.names:
            nn.init.normal_(self.prefix, std=0.02)
        init_orthogonal(self.expert_embed)
        for name in self.names:
            nn.init.zeros_(getattr(self, f'frozen_{name}'))
        self.frozen.fill_(False)
        self.steps.zero_()

    def weight(self, name: str) -> Tensor:
        """The parameter, or its frozen copy in stage 2 (then with a gradient of exact zeros)."""
        # a copy: autograd keeps it, and another block may begin before a backward that comes later
        frozen = self.frozen.clone()
        chosen = torch.where(frozen, getattr(self, f'frozen_{name}'), getattr(self, name))
        return chosen.float()

    def forward(self, cells: Tensor) -> Tensor:
        """Scores (6); raw patches (B, L, F) -> (B * (G + L), E) float32."""
        features = F.linear(cells.float(), self.weight('project'))
        if 'prefix' in self.names:
            prefix = self.weight('prefix').expand(cells.shape[0], -1, -1)
            features = torch.cat([prefix, features], dim=1)
        return F.linear(features, self.weight('expert_embed')).flatten(0, 1)

    @torch.no_grad()
    def freeze(self, due: Tensor) -> None:
        """Begin stage 2 if it is due, 0-dim bool, and has not begun; nothing is read back."""
        begins = due & ~self.frozen
        for name in self.names:
            copy = getattr(self, f'frozen_{name}')
            copy.copy_(torch.where(begins, getattr(self, name), copy))
        self.frozen |= due

    @torch.no_grad()
    def restart(self) -> bool:
        """Back to the start of stage 1 with what was frozen; returns whether it was frozen."""
        self.steps.zero_()
        if not self.frozen:
            return False
        # optimizers have moved the parameters behind the copies
        for name in self.names:
            getattr(self, name).copy_(getattr(self, f'frozen_{name}'))
            getattr(self, f'frozen_{name}').zero_()
        self.frozen.fill_(False)
        return True
