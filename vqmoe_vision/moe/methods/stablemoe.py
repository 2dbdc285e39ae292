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
announces its length by `start_training`, or `stage1_steps`. It is dropless.

Preset 'group' is what the tables published with VQMoE call StableMoE: a one-stage softmax router
with normalised expert embeddings. Their code, `CustomNaiveGate_Balance_StableMoE` of
giangdip2410/VQMoE, has neither the distillation nor the second stage of the method of that name.

Legend: B images, L patches per image, N tokens per image, T = B * N tokens, D width, E experts, K
experts per token, F = 16 * channels raw features of a patch, W = 50 distilled width, G prefix
tokens.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..config import BalancedConfig, Named, TopKConfig, loss_weight, option
from ..experts import Experts
from ..layer import RoutedMlp
from ..losses import Loss
from ..raw_patches import Host, RawPatches
from ..routing import Routing, TopKRouter, full_precision, init_orthogonal, top_k_experts

CELLS = 4  # a patch is averaged to CELLS x CELLS cells before D sees it
DISTILLED_WIDTH = 50  # of the paper
DEFAULT_STAGE1_STEPS = 6000  # of the paper's language model, where nobody says how long training is
_ONE_STAGE = {'two_stage': False}  # where options have no effect


@dataclass(frozen=True, kw_only=True)
class StableMoEConfig(BalancedConfig, TopKConfig):
    """Options of StableMoE.

    Args:
        stage1_steps: Updates until the distilled router is frozen; None takes the fraction.
        stage1_fraction: Share of an announced training.
        balance_weight: Weight of (5), stage 1.
        distill_weight: Weight of (7), stage 1.
        two_stage: False gives the simplified one-stage router of the 'group' preset.
    """

    PRESETS: ClassVar[Named] = {
        'paper': {},
        'matched': {'top_k': 2},
        'group': {'two_stage': False, 'top_k': 2},
    }

    # the sigmoid of two stages begins a little above a half
    EXACT_UPCYCLING: ClassVar[Named] = {'one-stage': {'two_stage': False, 'top_k': 2}}

    stage1_steps: int | None = option(None, 1, bounds='[1, inf)', of_weights=False, idle=_ONE_STAGE)
    stage1_fraction: float = option(
        0.1,
        0.5,
        bounds='(0, 1]',
        of_weights=False,
        idle={**_ONE_STAGE, 'stage1_steps': lambda n: n is not None},
    )
    balance_weight: float = loss_weight(0.3, 0.1, balances=True, idle=_ONE_STAGE)
    distill_weight: float = loss_weight(1.0, 0.5, idle=_ONE_STAGE)
    two_stage: bool = option(True)

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = 'at least 2 with two_stage=False, else every weight is 1 and nothing is learned'
        self.require('top_k', self.two_stage or self.top_k > 1, allowed)


def read_patches(images: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Average patches to 4 x 4 cells, (B, channels, height, width) -> (B, L, F) without a graph."""
    rows, columns = grid_size
    cells = F.adaptive_avg_pool2d(images.detach(), (rows * CELLS, columns * CELLS))
    # not pixel_unshuffle, which leaves an empty batch in the shape it came in
    return F.unfold(cells, CELLS, stride=CELLS).transpose(1, 2)


class DistilledRouter(nn.Module):
    """D and E^ of (6): raw patches in, scores out. The frozen router is a copy kept in buffers.

    Parameters themselves cannot be frozen: momentum and weight decay move one whose gradient is
    zero, and one without breaks data-parallel training.
    """

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
        return torch.where(frozen, getattr(self, f'frozen_{name}'), getattr(self, name)).float()

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


class StableRouter(TopKRouter):
    """Two-stage router, StableMoE (1) to (9)."""

    config: StableMoEConfig
    raw_patches: RawPatches
    # assigns by the raw patch of a position, wherever the token in it comes from
    permutation_equivariant = False

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
            student_scores = self.among_on(self.distilled(patches))
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
        terms: dict[str, Loss] = {
            'balance': config.balance_weight * losses.overload(gates, indices, config.num_experts),
            'distill': torch.where(stage1, config.distill_weight * distill, 0.0),
        }
        return losses.balanced(terms, config.global_balance)


class EmbeddingRouter(TopKRouter):
    """Softmax over the K best of `E_i . x / |E_i|`."""

    has_losses = False

    def __init__(self, in_features: int, config: TopKConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.expert_embed = nn.Parameter(torch.empty(config.num_experts, in_features, **factory))
        self.init_weights()

    def init_weights(self) -> None:
        """Orthogonal of gain 0.32, as the tables' code."""
        # no score depends on the length, but a step of the optimizer turns a longer embedding less
        init_orthogonal(self.expert_embed, gain=0.32)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens (T, D) in float32."""
        with full_precision(x):
            scores = F.linear(x.float(), F.normalize(self.expert_embed.float(), dim=-1))
            chosen, indices = top_k_experts(self.among_on(scores), self.config.top_k)
        return Routing(indices, chosen.softmax(dim=-1))

    def no_weight_decay(self) -> set[str]:
        """The expert embeddings: only their direction counts."""
        return {'expert_embed'}


class StableMoEMlp(RoutedMlp):
    """`RoutedMlp` whose router moves from stage 1 to stage 2.

    Args:
        router: The learned and the distilled router.
        experts: The layer's experts.
    """

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

    def moves_state(self) -> bool:
        """Whether there is a stage to count for."""
        return True

    def apply_update(self) -> bool:
        """Count an update, which changes no answer."""
        if self.training:  # statistics may be collected in eval mode
            self.router.distilled.steps += 1
            self._counted = True
        return False

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
