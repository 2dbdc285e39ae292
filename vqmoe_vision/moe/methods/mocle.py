"""MoCLE: the cluster of an image decides for all of its tokens, beside an expert for everything.

"Mixture of Cluster-conditional LoRA Experts" (Gou et al., arXiv 2312.12379): samples are clustered
once, before training, by k-means on features of a frozen network. For a sample of cluster k, and
any token x of it:

    logits = W C[k] + b + eps,  eps ~ N(0, 0.1^2) while training      C: a learned embedding
    G = softmax(logits / tau),  e = argmax G,  tau = 0.05
    y = G_e expert_e(x) + (1 - G_e) universal(x)

Both weights sum to 1, and there is no balance loss.

Where we differ: experts are whole MLPs in the place of the dense one, one of them universal; the
paper's are LoRAs (rank 8) beside a frozen linear layer of a language model. The paper clusters
instructions by sentence embeddings. Images are clustered by features of a dense vision transformer
of this model's shape and training set: means of the patches after its last norm. MoCE (arXiv
2402.05382) takes an autoencoder's. The paper's embedding is as wide as its features, ours as the
tokens. Every layer has its own, which starts as in their code, as the paper does not say how: the
cluster decides from the first step on. Their code multiplies each expert by its weight twice, the
paper and we once. Noise is drawn per image.

The frozen network runs once per image, before the first block and for all layers. Network and
centroids are buffers of one module in the stem: a checkpoint has all that routes, and clusters
cannot move while anything learns. docs/methods.md says how they come about.

Legend: B images, N tokens per image, T = B * N, D width, E experts with the universal one, K
clusters, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codebooks.codebook import nearest_code
from ..codebooks.usage import kmeans
from ..config import MoeConfig, check, check_weights, option
from ..image_reader import Features, ImageReader
from ..losses import token_mean
from ..raw_patches import Host, RawPatches
from ..routing import Router, Routing, expert_load, full_precision


@dataclass(frozen=True, kw_only=True)
class MoCLEConfig(MoeConfig):
    """Options of MoCLE, whose last expert is the universal one; with two experts nothing is chosen.

    Args:
        num_clusters: K, clusters of images, at least 1.
        temperature: tau, above 0.
        router_noise: Standard deviation of the noise in the logits, training only, at least 0.
    """

    # both weights of a token sum to 1
    EXACT_UPCYCLING: ClassVar[dict[str, dict[str, Any]]] = {'any': {}}

    num_clusters: int = option(64, 8, of_weights=False, idle={'num_experts': 2})
    temperature: float = option(0.05, 1.0, idle={'num_experts': 2})
    router_noise: float = option(0.1, 0.0, of_weights=False, idle={'num_experts': 2})

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = 'at least 2: the universal one, and others to choose from'
        self.require('num_experts', self.num_experts >= 2, allowed)
        self.require('num_clusters', self.num_clusters >= 1, 'at least 1')
        self.require('temperature', 0 < self.temperature < math.inf, 'above 0 and finite')
        check_weights(self, 'router_noise')


class Clusters(ImageReader):
    """Tells the cluster of an image: the nearest centroid of its features."""

    centroids: Tensor  # (K, F), random until `fit`

    def __init__(self, config: MoCLEConfig, features: Features, **factory: Any) -> None:
        super().__init__(features, factory.get('device'))
        shape = (config.num_clusters, features.width)
        self.register_buffer('centroids', torch.empty(shape, **factory))
        self.init_weights()

    def init_weights(self) -> None:
        """Random centroids of the length of normalised features."""
        nn.init.normal_(self.centroids)
        self.void()

    def take_over(self, features: Tensor) -> str:
        """As `ImageReader`: k-means with a fixed seed."""
        number = len(self.centroids)
        allowed = f'at most {len(features)}, one for each image of the training set'
        check(number <= len(features), 'num_clusters', number, allowed)
        finite = bool(features.isfinite().all())
        check(finite, 'features', 'nan or infinite', 'finite numbers for each image')
        self.centroids.copy_(kmeans(features, number))
        sizes = self._nearest(features).bincount(minlength=number)
        return (
            f'{number} clusters of {len(features)} images, the smallest of {int(sizes.min())} and '
            f'the largest of {int(sizes.max())}'
        )

    def read(self, images: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Cluster of each image, (B,) int64."""
        features = self.features(images)
        with full_precision(features):
            return self._nearest(features)

    def _nearest(self, features: Tensor) -> Tensor:
        return nearest_code(features, self.centroids.float())


class ClusterRouter(Router):
    """Sends all tokens of an image to the expert of its cluster, and to the universal one."""

    per_image = True
    has_losses = False
    raw_patches: RawPatches

    def __init__(self, in_features: int, config: MoCLEConfig, host: Host, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.raw_patches = host.raw_patches
        chosen = config.num_experts - 1
        self.cluster_embed = nn.Parameter(torch.empty(config.num_clusters, in_features, **factory))
        self.weight = nn.Parameter(torch.empty(chosen, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(chosen, **factory))
        self.init_weights()

    def init_weights(self) -> None:
        """As `nn.Embedding` and `nn.Linear`, which their code has (gyhdog99/MoCLE 68282ec)."""
        nn.init.normal_(self.cluster_embed)
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Routing:
        """Route images (B, N, D) in float32."""
        clusters = self.raw_patches.current()
        self.raw_patches.check_number('images', x.shape[0], clusters.shape[0])
        num_tokens, config = x.shape[1], self.config
        with full_precision(x):
            embedded = self.cluster_embed.index_select(0, clusters).float()
            logits = F.linear(embedded, self.weight.float(), self.bias.float())
            if self.training and config.router_noise > 0:
                logits = logits + torch.randn_like(logits) * config.router_noise
            probs = (logits / config.temperature).softmax(dim=-1)
            # by logit: small probabilities underflow to equals
            expert = logits.argmax(dim=-1, keepdim=True)
            gate = probs.gather(1, expert)
        universal = torch.full_like(expert, config.num_experts - 1)
        stats = {
            'gate': token_mean(gate.detach().squeeze(1)),
            'cluster_usage': expert_load(clusters, config.num_clusters),
        }
        return Routing(
            torch.cat([expert, universal], dim=1).repeat_interleave(num_tokens, dim=0),
            torch.cat([gate, 1 - gate], dim=1).repeat_interleave(num_tokens, dim=0),
            stats=stats,
        )

    def no_weight_decay(self) -> set[str]:
        """The embeddings: decay would only flatten the gates."""
        return {'cluster_embed'}

    @property
    def experts_per_token(self) -> float:
        """The chosen and the universal one."""
        return 2
