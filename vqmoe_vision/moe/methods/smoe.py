"""SMoE: sparse mixture of experts with a softmax top-k router.

V-MoE, "Scaling Vision with Sparse Mixture of Experts" (arXiv 2106.05974), numbered as there:

    (1)  MoE(x) = sum_i g(x)_i e_i(x)
    (2)  g(x) = TOP_k(softmax(W x + eps)),  eps ~ N(0, (noise / E)^2) while training

TOP_k keeps the k largest and does not renormalise (`renormalize=True` gives GShard's and Mixtral's
softmax over the selected logits). Options of DeepSeek-V3 (arXiv 2412.19437), numbered as there:

    (12)  y = sum_s e_s(x) + sum_i g_i e_i(x)         s: `num_shared_experts`, which all tokens have
    (13)  g_i = s_i / sum of the selected             `renormalize`
    (15)  s_i = sigmoid(w_i x)                        `score='sigmoid'`
    (16)  the selected are TOP_k(s_i + b_i)           `bias_update_rate`
    (19)  s'_i = s_i / sum_j s_j                      what losses take as probabilities

Noise is in the logits of both scores. These order as sigmoids do, so that (9) holds of both.

Auxiliary losses: importance (6) and load (9), at 0.005 each as in V-MoE's released configurations.
Options are the balance loss of Switch (arXiv 2101.03961, 4) and the z-loss of ST-MoE (arXiv
2202.08906, 5), of logits, and a bias in the place of a loss, see `losses.py`.

Where we differ: dropless unless `capacity_factor` is set, then capacity = ceil(k T C / E), not
rounded up to a multiple of 4 as by the released code. The routing group is the batch on a device,
for losses that on all devices. Experts start from different draws, in the released code equal.

Legend: T tokens, D width, E experts, K experts per token, S shared experts, C capacity. In a router
E has no shared experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..config import BalancedConfig, Named, TopKConfig, check_renormalize, loss_weight, option
from ..losses import LossFreeConfig, LossFreeRouter
from ..raw_patches import Host
from ..routing import (
    Routing,
    full_precision,
    init_lecun_normal,
    probabilities,
    renormalized,
    with_shared,
    within_capacity,
)


@dataclass(frozen=True, kw_only=True)
class SMoEConfig(BalancedConfig, LossFreeConfig, TopKConfig):
    """Options of SMoE.

    Args:
        top_k: Experts that the router chooses for a token.
        score: Of a logit; sigmoids of a token do not sum to 1.
        num_shared_experts: S of the experts, the last, that every token has beside those.
        renormalize: Let the weights of the selected experts sum to 1; not with one.
        router_bias: Bias in the router.
        router_init_scale: Variance of the router's start times D; Switch (2.4) takes 0.1.
        router_noise: Standard deviation of the router noise times E, training only.
        importance_weight: Weight of the importance loss.
        load_weight: Weight of the load loss; needs noise.
        balance_weight: Weight of the Switch balance loss.
        z_weight: Weight of the router z-loss.
        capacity_factor: Places over assignments while training; None drops nothing.
        eval_capacity_factor: The same in eval mode.
        batch_prioritized: Serve tokens with large weights first when a capacity is set.
        train_router: False freezes the router at its random start, where it can have no loss.

    Presets: 'group', the router of the tables published with VQMoE (their loss is always zero);
    'frozen', a control that a learned router has to beat; 'sigmoid', balanced by a bias alone, as
    DeepSeek-V3; 'shared', one shared and one chosen expert; 'fine', 8 of 32 experts of a quarter of
    the width (DeepSeekMoE, arXiv 2401.06066). The last two have the compute of 'matched', 'fine' if
    the dense `mlp_ratio` is 4.
    """

    PRESETS: ClassVar[Named] = {
        'paper': {},
        'matched': {'top_k': 2},
        'group': {
            'router_bias': True,
            'renormalize': True,
            'router_noise': 0.0,
            'importance_weight': 0.0,
            'load_weight': 0.0,
        },
        'frozen': {
            'train_router': False,
            'router_noise': 0.0,
            'importance_weight': 0.0,
            'load_weight': 0.0,
        },
        'sigmoid': {
            'score': 'sigmoid',
            'renormalize': True,
            'bias_update_rate': 0.001,
            'router_noise': 0.0,
            'importance_weight': 0.0,
            'load_weight': 0.0,
        },
        'shared': {'num_shared_experts': 1, 'top_k': 1},
        'fine': {'num_experts': 32, 'top_k': 8, 'expert_mlp_ratio': 1.0},
    }

    # the K largest of a softmax sum to less than 1
    EXACT_UPCYCLING: ClassVar[Named] = {
        'renormalize': {'renormalize': True},
        'shared': {'renormalize': True, 'score': 'sigmoid', 'num_shared_experts': 1},
    }

    top_k: int = option(2, 1)
    score: Literal['softmax', 'sigmoid'] = option('softmax', 'sigmoid')
    num_shared_experts: int = option(0, 1, bounds='[0, inf)', of_weights=False)
    renormalize: bool = option(False)
    router_bias: bool = option(False)
    # with 0 tokens tie, with more a router is too sure to learn
    router_init_scale: float = option(1.0, 0.1, bounds='[1e-6, 1e4]', of_weights=False)
    router_noise: float = option(1.0, 0.5, bounds='[0, inf)', of_weights=False)
    importance_weight: float = loss_weight(0.005, 0.1, balances=True)
    load_weight: float = loss_weight(0.005, 0.1, balances=True)
    balance_weight: float = loss_weight(0.0, 0.1, balances=True)
    z_weight: float = loss_weight(0.0, 0.1)
    capacity_factor: float | None = option(
        None,
        {'capacity_factor': 1.0, 'batch_prioritized': True},
        bounds='(0, inf)',
        of_weights=False,
    )
    eval_capacity_factor: float | None = option(
        None, {'eval_capacity_factor': 1.0}, bounds='(0, inf)'
    )
    batch_prioritized: bool = option(False)
    train_router: bool = option(True, of_weights=False)

    @property
    def num_routed(self) -> int:
        """But for the shared ones."""
        return self.num_experts - self.num_shared_experts

    @property
    def learns_routing(self) -> bool:
        """Unless the router is frozen at its random start."""
        return self.train_router

    @property
    def loss_weights(self) -> list[str]:
        """Names of the weights of losses."""
        return [each.name for each in fields(self) if each.name.endswith('_weight')]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_renormalize(self.renormalize, self.top_k)
        for name in (*self.loss_weights, 'bias_update_rate'):
            valid = self.train_router or getattr(self, name) == 0
            self.require(name, valid, '0 with train_router=False')
        valid = self.load_weight == 0 or self.router_noise > 0
        self.require('load_weight', valid, '0 when router_noise=0, which defines the load loss')
        capped = self.capacity_factor is not None or self.eval_capacity_factor is not None
        valid = capped or not self.batch_prioritized
        self.require('batch_prioritized', valid, 'False unless a capacity_factor is set')


class SMoERouter(LossFreeRouter):
    """Top-k router, V-MoE (2) or DeepSeek-V3 (13) to (16)."""

    config: SMoEConfig

    def __init__(
        self, in_features: int, config: SMoEConfig, host: Host | None = None, **factory: Any
    ) -> None:
        super().__init__(config, **factory)
        self.has_losses = any(getattr(config, name) > 0 for name in config.loss_weights)
        self.summands = 1 + config.num_shared_experts
        self.weight = nn.Parameter(torch.empty(config.num_routed, in_features, **factory))
        bias = torch.empty(config.num_routed, **factory)
        self.bias = nn.Parameter(bias) if config.router_bias else None
        for parameter in self.parameters():
            parameter.requires_grad_(config.train_router)
        self.init_weights()

    def init_weights(self) -> None:
        """V-MoE's lecun normal, or Switch's narrower one."""
        super().init_weights()
        init_lecun_normal(self.weight, self.config.router_init_scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    reset_parameters = init_weights

    def forward(self, x: Tensor) -> Routing:
        """Route tokens (T, D) in float32."""
        config = self.config
        with full_precision(x):
            # detached: a fine-tuning may freeze and unfreeze a model as a whole
            own: Any = [
                p if p is None else (p if config.train_router else p.detach()).float()
                for p in (self.weight, self.bias)
            ]
            noisy = logits = self.among_on(F.linear(x.float(), *own))
            if self.training and config.router_noise > 0:
                noisy = logits.add(torch.randn_like(logits), alpha=self.noise_std())
            logs = self.log_scores(noisy)
            probs = probabilities(logs)
            scores = probs if config.score == 'softmax' else logs.exp()
            # by logit: small probabilities underflow to equals
            indices = self.choose(noisy, scores)
            weights = scores.gather(1, indices)
            kept = self._within_capacity(indices, weights)
            if config.renormalize and config.score == 'softmax':
                weights = renormalized(weights)
            elif config.renormalize:  # sigmoids may all round to 0, but not their ratios
                weights = logs.gather(1, indices).softmax(dim=-1)
            terms = losses.weighted(
                self,
                importance=lambda: losses.importance(
                    # without noise the same
                    probs if noisy is logits else probabilities(self.log_scores(logits))
                ),
                load=lambda: losses.load(logits, noisy, self.noise_std(), config.top_k),
                balance=lambda: losses.load_balance(probs, indices),
                z=lambda: losses.router_z(logits),
                **self.further_losses(logits),
            )
        routing = Routing(indices, weights, terms, kept=kept)
        return with_shared(routing, config.num_experts, config.num_shared_experts)

    def log_scores(self, logits: Tensor) -> Tensor:
        """Logarithms of scores (T, E), up to a number for each token; their softmax is (19)."""
        return logits if self.config.score == 'softmax' else F.logsigmoid(logits)

    def further_losses(self, logits: Tensor) -> dict[str, Callable[[], Tensor]]:
        """Of a subclass: what makes them by name, of logits without noise."""
        return {}

    @property
    def experts_per_token(self) -> float:
        """K + S."""
        return self.config.top_k + self.config.num_shared_experts

    def noise_std(self) -> float:
        """Standard deviation of the noise in logits."""
        return self.config.router_noise / self.config.num_routed

    def _within_capacity(self, indices: Tensor, weights: Tensor) -> Tensor | None:
        config = self.config
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if factor is None:
            return None
        # a tensor, as no file of torch.export holds math.ceil of a batch of any size
        assigned = torch.scalar_tensor(indices.numel(), dtype=torch.float64)
        # of a factor beyond all bounds int64 would make a negative number
        capacity = (assigned * factor / config.num_routed).ceil().minimum(assigned).long()
        priority = weights[:, 0] if config.batch_prioritized else None
        return within_capacity(indices, config.num_routed, capacity, priority)
