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

E keeps learning in stage 2 through the gate; the two losses are gone. Eval mode
always assigns by the distilled router, in both stages.

Where we differ: the raw token of the paper is a word and D its embedding of width 50; here it is an
image patch, averaged to 4 x 4 cells, and D one linear layer of width 50 (each MoE layer has its
own); a prefix token has a learned D. Losses are means over tokens where the authors' code sums.
`top_k` above 1 assigns the K best and distils all K as targets. Stage 1 lasts `stage1_steps`
updates (the paper: the first tenth of training). Dropless, the authors' code has a capacity of 2.

The frozen router is a copy kept in buffers. Freezing the parameters themselves would not do:
optimizers with momentum or weight decay move a parameter whose gradient is zero, and a parameter
that stops to receive gradients breaks data-parallel training.

The 'group' preset is the method of that name in the tables published with VQMoE: a one-stage
softmax router with normalised expert embeddings.

Legend: B images, N tokens per image, L patches per image, T = B * N tokens, D width, E experts,
K experts per token, F = 16 * channels raw features of a patch, W = 50 distilled width, G prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..config import TopKConfig, check, check_unused, check_weights
from ..experts import Experts
from ..layer import RoutedMlp
from ..routing import Router, Routing, full_precision, init_orthogonal, top_k_experts

CELLS = 4  # a patch is averaged to CELLS x CELLS cells before D sees it
DISTILLED_WIDTH = 50  # of the paper


@dataclass(frozen=True, kw_only=True)
class StableMoEConfig(TopKConfig):
    """Options of StableMoE.

    Args:
        top_k: Experts per token.
        stage1_steps: Updates after which the distilled router is frozen.
        balance_weight: Weight of (5), stage 1.
        distill_weight: Weight of (7), stage 1.
        two_stage: False gives the simplified one-stage router of the 'group' preset.

    Presets: 'paper'; 'matched', the compute of two experts per token, as every row of our
    comparisons has; 'group'.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        'paper': {},
        'matched': {'top_k': 2},
        'group': {'two_stage': False, 'top_k': 2},
    }

    stage1_steps: int = 6000
    balance_weight: float = 0.3
    distill_weight: float = 1.0
    two_stage: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.stage1_steps >= 1, 'stage1_steps', self.stage1_steps, 'at least 1')
        check_weights(self, 'balance_weight', 'distill_weight')
        if not self.two_stage:
            stages = ['stage1_steps', 'balance_weight', 'distill_weight']
            check_unused(self, stages, 'two_stage=False')
        check(
            self.two_stage or self.top_k > 1,
            'top_k',
            self.top_k,
            'at least 2 with two_stage=False, else every weight is 1 and the router learns nothing',
        )


class RawPatches:
    """Raw patches of the images that a model is looking at, handed from its stem to its routers.

    Holds plain data, never a graph: the routers' decisions must not depend on anything learned
    before them. Copies and pickles of a model start empty.
    """

    def __init__(self) -> None:
        self.cells: Tensor | None = None

    def __getstate__(self) -> dict[str, None]:
        return {'cells': None}

    def read(self, images: Tensor, grid_size: tuple[int, int]) -> None:
        """Average every patch to 4 x 4 cells.

        Args:
            images: (B, channels, height, width), patches of equal size.
            grid_size: Patches per column and row.
        """
        rows, columns = grid_size
        cells = F.adaptive_avg_pool2d(images.detach(), (rows * CELLS, columns * CELLS))
        self.cells = F.pixel_unshuffle(cells, CELLS).flatten(2).transpose(1, 2)  # (B, L, F)


class DistilledRouter(nn.Module):
    """D and E^ of (6), with their frozen copy.

    Args:
        in_chans: Image channels.
        num_experts: E.
        num_prefix_tokens: G, tokens before the patches; each has a learned D.
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
        return torch.where(
            self.frozen, getattr(self, f'frozen_{name}'), getattr(self, name)
        ).float()

    def forward(self, cells: Tensor) -> Tensor:
        """Scores (6); raw patches (B, L, F) -> (B * (G + L), E) float32."""
        features = F.linear(cells.float(), self.weight('project'))
        if 'prefix' in self.names:
            prefix = self.weight('prefix').expand(cells.shape[0], -1, -1)
            features = torch.cat([prefix, features], dim=1)
        return F.linear(features, self.weight('expert_embed')).flatten(0, 1)

    def macs_per_token(self) -> int:
        """Multiply-accumulates of one routing decision."""
        return self.project.numel() + self.expert_embed.numel()

    @torch.no_grad()
    def advance(self, stage1_steps: int) -> bool:
        """Count one update, freeze when stage 1 is over; returns whether it froze now."""
        self.steps += 1
        if bool(self.frozen) or int(self.steps) < stage1_steps:
            return False
        for name in self.names:
            getattr(self, f'frozen_{name}').copy_(getattr(self, name))
        self.frozen.fill_(True)
        return True

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


class StableRouter(Router):
    """Two-stage router, StableMoE (1) to (9).

    Args:
        in_features: D.
        config: Options.
        source: Where the raw patches of the current images are found.
        in_chans: Image channels.
        num_prefix_tokens: G.
    """

    config: StableMoEConfig

    def __init__(
        self,
        in_features: int,
        config: StableMoEConfig,
        source: RawPatches,
        in_chans: int,
        num_prefix_tokens: int,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.config = config
        self.stage1_steps = config.stage1_steps
        self.source = source
        self.expert_embed = nn.Parameter(torch.empty(config.num_experts, in_features, **factory))
        self.distilled = DistilledRouter(in_chans, config.num_experts, num_prefix_tokens, **factory)
        self.init_weights()

    def init_weights(self) -> None:
        """Orthogonal with gain 0.1, as the authors' code."""
        init_orthogonal(self.expert_embed)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens (T, D) in float32 by the learned or the distilled router."""
        cells = self.source.cells
        assert cells is not None, 'the stem reads the raw patches before any block runs'
        k = self.config.top_k
        with full_precision(x):
            scores = F.linear(x.float(), self.expert_embed.float())
            student_scores = self.distilled(cells)
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

    def macs_per_token(self) -> int:
        """Multiply-accumulates of one routing decision."""
        return self.expert_embed.numel() + self.distilled.macs_per_token()

    def no_weight_decay(self) -> set[str]:
        """The expert embeddings: decay would only flatten the gates."""
        return {'expert_embed', 'distilled.expert_embed'}

    def _losses(self, gates: Tensor, student_scores: Tensor, indices: Tensor) -> dict[str, Tensor]:
        num_experts = self.config.num_experts
        chosen = student_scores.log_softmax(dim=-1).gather(1, indices)
        distill = -losses.token_mean(chosen.mean(dim=1))
        balance = losses.overload(gates, indices, num_experts)
        stage1 = ~self.distilled.frozen
        return {
            'balance': torch.where(stage1, self.config.balance_weight * balance, 0.0),
            'distill': torch.where(stage1, self.config.distill_weight * distill, 0.0),
        }


class SimplifiedRouter(Router):
    """One-stage router of the 'group' preset: softmax over the top-k of E_i . x / |E_i|.

    Args:
        in_features: D.
        config: Options.
    """

    config: StableMoEConfig

    def __init__(self, in_features: int, config: StableMoEConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.expert_embed = nn.Parameter(torch.empty(config.num_experts, in_features, **factory))
        self.init_weights()

    def init_weights(self) -> None:
        """Orthogonal; the length does not matter."""
        init_orthogonal(self.expert_embed)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens (T, D) in float32."""
        with full_precision(x):
            scores = F.linear(x.float(), F.normalize(self.expert_embed.float(), dim=-1))
            chosen, indices = top_k_experts(scores, self.config.top_k)
        return Routing(indices, chosen.softmax(dim=-1))

    def macs_per_token(self) -> int:
        """Multiply-accumulates of one routing decision."""
        return self.expert_embed.numel()

    def no_weight_decay(self) -> set[str]:
        """The expert embeddings: only their direction counts."""
        return {'expert_embed'}


class StableMoEMlp(RoutedMlp):
    """`RoutedMlp` whose router moves from stage 1 to stage 2."""

    router: StableRouter

    def macs(self, num_tokens: int) -> int:
        """As `RoutedMlp`; prefix tokens have a learned D in the place of a product."""
        distilled = self.router.distilled
        num_prefix_tokens = distilled.prefix.shape[0] if 'prefix' in distilled.names else 0
        return super().macs(num_tokens) - num_prefix_tokens * distilled.project.numel()

    def apply_update(self) -> bool:
        """Count an update; freeze the distilled router at the end of stage 1."""
        # statistics may be collected in eval mode, which is no step of training
        return self.training and self.router.distilled.advance(self.router.stage1_steps)


def set_stage1_steps(model: nn.Module, steps: int) -> None:
    """Set after how many updates every StableMoE router of a model freezes.

    Args:
        model: Any model; without StableMoE layers nothing happens.
        steps: At least 1, usually a tenth of all optimizer steps.

    Raises:
        ValueError: If `steps` is below 1.
    """
    check(steps >= 1, 'steps', steps, 'at least 1')
    for module in model.modules():
        if isinstance(module, StableRouter):
            module.stage1_steps = steps


def restart_stage1(model: nn.Module) -> int:
    """Let every StableMoE router of a model learn again, for a new training from old weights.

    Args:
        model: Any model; without StableMoE layers nothing happens.

    Returns:
        How many routers were frozen.
    """
    return sum(m.distilled.restart() for m in model.modules() if isinstance(m, StableRouter))


def build(
    in_features: int,
    config: StableMoEConfig,
    experts: Experts,
    source: RawPatches,
    in_chans: int,
    num_prefix_tokens: int,
    **factory: Any,
) -> RoutedMlp:
    """StableMoE layer for tokens of width `in_features`."""
    if not config.two_stage:
        return RoutedMlp(SimplifiedRouter(in_features, config, **factory), experts)
    router = StableRouter(in_features, config, source, in_chans, num_prefix_tokens, **factory)
    return StableMoEMlp(router, experts)
