"""TGR-MoE: the router of SMoE learns from clusters of what a frozen dense model says of a token.

"Teacher-Guided Routing for Sparse Vision Mixture-of-Experts" (arXiv 2604.21330, CVPR 2026). Known
of it, without public code, are its abstract and summaries: a teacher router is built of a
pretrained dense model's intermediate representations, the student's router learns its outputs by a
KL divergence beside the task, and nothing is added at prediction. The rest is a reconstruction:

    f_t  the teacher's token t after its last norm, of which k-means makes a centroid c_i for each
         expert before training; m is the mean of the centroids
    q_t = softmax_i(cos(f_t - m, c_i - m) / tau)                               the teacher router
    loss = mean_t sum_i q_ti log(q_ti / p_ti),  p: SMoE's probabilities without noise

All layers have one teacher router. Tokens are not detached: the blocks before learn of it too.

The teacher is a vision transformer of this model's shape, trained on the same images, and stands in
its stem as that of MoCLE. It runs in training alone, once for all layers. Where its grid of patches
is another one, its features are resized to the model's.

Legend: B images, N tokens per image, T = B * N, D width, E experts, F features of a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..moe.config import Named, loss_weight, option
from ..moe.losses import token_mean
from ..moe.methods import Method
from ..moe.methods.smoe import SMoEConfig, SMoERouter
from ..moe.raw_patches import Host, RawPatches
from ..moe.routing import Routing, full_precision
from .mocle import Clusters

# Of an image as many tokens are clustered, at most.
CLUSTERED = 8

_FROZEN = SMoEConfig.PRESETS['frozen'] | {'teacher_weight': 0.0}  # which nothing can teach


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(SMoEConfig):
    """Options of TGR-MoE: those of SMoE, and of its teacher.

    Args:
        teacher_weight: Weight of the divergence from the teacher's probabilities.
        teacher_temperature: tau, in differences of cosines.
    """

    PRESETS: ClassVar[Named] = {'paper': {}, 'matched': {'top_k': 2}}

    teacher_weight: float = loss_weight(
        1.0, 0.1, {'router_bias': True, 'renormalize': True}, _FROZEN
    )
    teacher_temperature: float = option(
        0.1, 0.5, bounds='(0, inf)', of_weights=False, idle={'teacher_weight': 0}
    )

    @property
    def num_clusters(self) -> int:
        """One for each expert that can be chosen."""
        return self.num_routed


class Teacher(Clusters):
    """Tells how near a token is to the cluster of each expert."""

    clustered = 'tokens'

    def __init__(self, config: TeacherConfig, network: Any, **factory: Any) -> None:
        super().__init__(config, network, **factory)  # type: ignore[arg-type]
        self.temperature = config.teacher_temperature

    def features(self, images: Tensor) -> Tensor:
        """Of some tokens of each image, in all columns of patches: (B * n, F) float32."""
        tokens = self._read(images, self.network.forward_features)
        return tokens[:, :: tokens.shape[1] // CLUSTERED + 1].flatten(0, 1)

    def forward(self, images: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Logarithms of the teacher's probabilities (B, N, E) in training; else none, (B, 0)."""
        if not self.training:
            return images.new_zeros(images.shape[0], 0)
        self._warn_once()
        tokens = self._read(images, self.network.forward_features)
        with full_precision(tokens):
            if grid_size != self.network.grid_size:
                prefix, patches = tokens.tensor_split([self.network.num_prefix_tokens], dim=1)
                maps = patches.mT.unflatten(2, self.network.grid_size)  # (B, F, rows, columns)
                maps = F.interpolate(maps, grid_size, mode='bilinear', antialias=True)
                tokens = torch.cat([prefix, maps.flatten(2).mT], dim=1)
            centroids = self.centroids.float()
            mean = centroids.mean(dim=0)
            cosines = F.normalize(tokens - mean, dim=-1) @ F.normalize(centroids - mean, dim=-1).t()
            return (cosines / self.temperature).log_softmax(dim=-1)


class TeacherRouter(SMoERouter):
    """SMoE's router, with the loss of the teacher."""

    per_image = True
    permutation_equivariant = False  # the teacher tells each token of its place
    config: TeacherConfig
    raw_patches: RawPatches

    def __init__(self, in_features: int, config: TeacherConfig, host: Host, **factory: Any) -> None:
        super().__init__(in_features, config, host, **factory)
        self.raw_patches = host.raw_patches

    def forward(self, x: Tensor) -> Routing:
        """Route images (B, N, D) in float32."""
        told = self.raw_patches.current()
        if self.training:
            self.raw_patches.check_number('tokens', x.shape[0] * x.shape[1], told.shape[:2].numel())
        return super().forward(x.flatten(0, 1))

    def further_losses(self, logits: Tensor) -> dict[str, Callable[[], Tensor]]:
        """The divergence of the probabilities (19) from the teacher's, in nats."""

        def divergence() -> Tensor:
            said = self.log_scores(logits).log_softmax(dim=-1)
            told = self.raw_patches.current().flatten(0, 1)
            return token_mean((told.exp() * (told - said)).sum(dim=-1))

        return {'teacher': divergence}


METHOD = Method(TeacherConfig, TeacherRouter, Teacher)
