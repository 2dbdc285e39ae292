"""StableMoE: a router that is learned, distilled, and then frozen.

"StableMoE: Stable Routing Strategy for Mixture of Experts" (Dai et al., ACL 2022, arXiv
2204.08396), numbered as there. E_i is the embedding of expert i, h a token inside the network, X
the raw input token:

    (1)  s_i = E_i . h,  a = argmax_i s_i               stage 1 assigns by the learned router
    (2)  y = sigmoid(s_a) expert_a(h)
    (5)  balance: see `losses.overload`
    (6)  s^_i = E^_i . D(X)                             the distilled router sees the raw token only
    (7)  distillation = cross entropy of softmax(s^) with the target a
    (9)  stage 2: a^ = argmax_i s^_i with D and E^ frozen, y = sigmoid(s_a^) expert_a^(h)

E keeps learning in stage 2 through the gate; the two losses are gone. Eval mode always assigns by
the distilled router.

Where we differ: the paper's raw token is a word and D its embedding of width 50. Here it is an
image patch, averaged to 4 x 4 cells, and D one linear layer of that width per MoE layer; a prefix
token has a learned D. Losses are means over tokens where the authors' code sums. `top_k` above 1
assigns the K best and distils all K. Stage 1 is the paper's first tenth of a training that
announces its length by `start_training`, or `stage1_steps`, or the 6,000 updates of their language
model. Weights of the losses are the paper's; the authors' scripts give 0.3 to the distillation too.
Dropless, the authors' code has a capacity of 2.

Preset 'group' is what the tables published with VQMoE call StableMoE: a one-stage softmax router
with normalised expert embeddings.

Legend: B images, N tokens per image, T = B * N tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..config import BalancedConfig, TopKConfig, check_weights
from ..experts import Experts
from ..joint_losses import Loss
from ..layer import RoutedMlp
from ..raw_patches import Host, RawPatches
from ..routing import Routing, TopKRouter, full_precision, init_orthogonal, top_k_experts
from ._distilled_router import CELLS, DistilledRouter
from ._embedding_router import EmbeddingRouter

DEFAULT_STAGE1_STEPS = 6000  # of the paper's language model, where nobody says how long training is


@dataclass(frozen=True, kw_only=True)
class StableMoEConfig(BalancedConfig, TopKConfig):
    """Options of StableMoE.

    Args:
        stage1_steps: Updates after which the distilled router is frozen, at least 1; None takes
            the fraction.
        stage1_fraction: Share of an announced training, above 0 and at most 1.
        balance_weight: Weight of (5), stage 1, at least 0.
        distill_weight: Weight of (7), stage 1, at least 0.
        two_stage: False gives the simplified one-stage router of the 'group' preset.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        'paper': {},
        'matched': {'top_k': 2},
        'group': {'two_stage': False, 'top_k': 2},
    }

    TRIALS: ClassVar[dict[str, dict[str, Any]]] = {
        'short': {'stage1_steps': 1, 'balance_weight': 0.1, 'distill_weight': 0.5},
        'long': {'stage1_fraction': 0.5, 'global_balance': False},
    }

    # the sigmoid of two stages begins a little above a half
    EXACT_UPCYCLING: ClassVar[dict[str, dict[str, Any]]] = {
        'one-stage': {'two_stage': False, 'top_k': 2},
    }

    NOT_OF_WEIGHTS: ClassVar[frozenset[str]] = frozenset(
        {'stage1_steps', 'stage1_fraction', 'balance_weight', 'distill_weight'}
    )

    stage1_steps: int | None = None
    stage1_fraction: float = 0.1
    balance_weight: float = 0.3
    distill_weight: float = 1.0
    two_stage: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        steps, fraction = self.stage1_steps, self.stage1_fraction
        self.require('stage1_steps', steps is None or steps >= 1, 'at least 1, or None')
        self.require('stage1_fraction', 0 < fraction <= 1, 'above 0 and at most 1')
        check_weights(self, 'balance_weight', 'distill_weight')
        self.require(
            'top_k',
            self.two_stage or self.top_k > 1,
            'at least 2 with two_stage=False, else every weight is 1 and the router learns nothing',
        )

    def unused(self) -> dict[str, str]:
        """What belongs to two stages, and the fraction beside a number of steps."""
        if not self.two_stage:
            names = ('stage1_steps', 'stage1_fraction', 'balance_weight', 'distill_weight')
            return dict.fromkeys((*names, 'global_balance'), 'two_stage=False')
        unused = {}
        if self.stage1_steps is not None:
            unused['stage1_fraction'] = f'stage1_steps={self.stage1_steps}'
        if self.balance_weight == 0:
            unused['global_balance'] = 'balance_weight=0'
        return unused


class StableRouter(TopKRouter):
    """Two-stage router, StableMoE (1) to (9)."""

    config: StableMoEConfig
    raw_patches: RawPatches

    def __init__(
        self, in_features: int, config: StableMoEConfig, host: Host, **factory: Any
    ) -> None:
        super().__init__()
        self.config = config
        self.raw_patches = host.raw_patches
        self.expert_embed = nn.Parameter(torch.empty(config.num_experts, in_features, **factory))
        self.distilled = DistilledRouter(
            host.in_chans, config.num_experts, host.num_prefix_tokens, **factory
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Orthogonal with gain 0.1, as the authors' code."""
        init_orthogonal(self.expert_embed)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens (T, D) in float32 by the learned or the distilled router."""
        patches = self.raw_patches.current()
        k = self.config.top_k
        with full_precision(x):
            scores = F.linear(x.float(), self.expert_embed.float())
            student_scores = self.distilled(patches)
            self.raw_patches.check_number('tokens', x.shape[0], student_scores.shape[0])
            student = top_k_experts(student_scores, k)[1]
            teacher = top_k_experts(scores, k)[1]
            indices = student
            if self.training:
                indices = torch.where(self.distilled.frozen, student, teacher)
            gates = scores.gather(1, indices).sigmoid()
            terms = self._losses(gates, student_scores, indices) if self.training else {}
            # the output reaches D and E^ with a gradient of zero, so that no parameter is unused
            weights = gates + 0 * student_scores.gather(1, indices)
            agreement = losses.token_mean((student[:, 0] == teacher[:, 0]).float())
        return Routing(indices, weights, terms, stats={'agreement': agreement})

    def no_weight_decay(self) -> set[str]:
        """The expert embeddings: decay would only flatten the gates."""
        return {'expert_embed', 'distilled.expert_embed'}

    def _losses(self, gates: Tensor, student_scores: Tensor, indices: Tensor) -> dict[str, Loss]:
        config, stage1 = self.config, ~self.distilled.frozen
        chosen = student_scores.log_softmax(dim=-1).gather(1, indices)
        distill = -losses.token_mean(chosen.mean(dim=1))
        # without gates it is zero
        gates = torch.where(stage1, gates, 0.0)
        balance = losses.overload(gates, indices, config.num_experts)
        return config.balanced(
            {
                'balance': config.balance_weight * balance,
                'distill': torch.where(stage1, config.distill_weight * distill, 0.0),
            }
        )


class StableMoEMlp(RoutedMlp):
    """`RoutedMlp` whose router moves from stage 1 to stage 2.

    Args:
        router: The learned and the distilled router.
        experts: The layer's experts.
    """

    # assigns by the raw patch of a position, wherever the token in it comes from
    permutation_equivariant = False
    _counted = True  # an update since the last block began, as far as the host knows
    router: StableRouter

    def __init__(self, router: StableRouter, experts: Experts) -> None:
        super().__init__(router, experts)
        self.stage1_steps = router.config.stage1_steps or DEFAULT_STAGE1_STEPS

    def start_training(self, num_updates: int) -> None:
        """Set how long stage 1 is, unless the options do."""
        config = self.router.config
        if config.stage1_steps is None:
            self.stage1_steps = max(1, round(config.stage1_fraction * num_updates))

    def apply_begin(self) -> bool:
        """Freeze the distilled router if stage 1 is over; the device alone knows whether it did."""
        if not self.training:
            return False
        distilled = self.router.distilled
        # not at the end of the last block: `optimizer.step()` may come after it
        distilled.freeze(distilled.steps >= self.stage1_steps)
        counted, self._counted = self._counted, False
        return counted

    def apply_update(self) -> bool:
        """Count an update, which changes no answer."""
        # statistics may be collected in eval mode, which is no step of training
        if self.training:
            self.router.distilled.steps += 1
            self._counted = True
        return False

    def fit_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The distilled router of images of three channels, for images of others.

        As timm's `adapt_input_conv`: one channel has the sum of the weights, so that a grey image
        has the answer that it has in colour; more channels have them in turn, and scaled.
        """
        fitted = super().fit_state(state)
        width, features = self.router.distilled.project.shape
        in_chans = features // CELLS**2
        for name in ('router.distilled.project', 'router.distilled.frozen_project'):
            if name not in fitted or in_chans == 3 or fitted[name].shape != (width, 3 * CELLS**2):
                continue
            by_channel = fitted[name].view(width, 3, CELLS**2)
            if in_chans == 1:
                by_channel = by_channel.sum(dim=1)
            else:
                by_channel = by_channel[:, torch.arange(in_chans) % 3] * (3 / in_chans)
            fitted[name] = by_channel.reshape(width, features)
        return fitted

    def restart(self) -> str | None:
        """Back to the start of stage 1 with what was frozen."""
        frozen = self.router.distilled.restart()
        return 'that were frozen learn to route again, in a first stage' if frozen else None


def build(
    in_features: int, config: StableMoEConfig, experts: Experts, host: Host, **factory: Any
) -> RoutedMlp:
    """StableMoE layer for tokens of width `in_features`."""
    if not config.two_stage:
        return RoutedMlp(EmbeddingRouter(in_features, config, **factory), experts)
    return StableMoEMlp(StableRouter(in_features, config, host, **factory), experts)
