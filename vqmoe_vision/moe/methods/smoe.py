"""SMoE: sparse mixture of experts with a softmax top-k router.

V-MoE, "Scaling Vision with Sparse Mixture of Experts" (arXiv 2106.05974), numbered as there:

    (1)  MoE(x) = sum_i g(x)_i e_i(x)
    (2)  g(x) = TOP_k(softmax(W x + eps)),  eps ~ N(0, (noise / E)^2) while training

TOP_k keeps the k largest and does not renormalise (`renormalize=True` gives GShard's and Mixtral's
softmax over the selected logits). Auxiliary losses: importance (6) and load (9), at 0.005 each as
in its released configurations. Options are the balance loss of Switch (arXiv 2101.03961, 4) and the
z-loss of ST-MoE (arXiv 2202.08906, 5), and a bias in the place of a loss, see `losses.py`.

Where we differ: dropless unless `capacity_factor` is set, then capacity = ceil(k T C / E), not
rounded up to a multiple of 4 as by the released code. The routing group is the batch on a device,
for losses that on all devices. Experts start from different draws, in the released code equal.

Legend: T tokens, D width, E experts, K experts per token, C capacity.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

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
    within_capacity,
)

LOSS_WEIGHTS = ('importance_weight', 'load_weight', 'balance_weight', 'z_weight')


@dataclass(frozen=True, kw_only=True)
class SMoEConfig(BalancedConfig, LossFreeConfig, TopKConfig):
    """Options of SMoE.

    Args:
        top_k: Experts per token.
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
    'frozen', a control that a learned router has to beat.
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
    }

    # the K largest of a softmax sum to less than 1
    EXACT_UPCYCLING: ClassVar[Named] = {'renormalize': {'renormalize': True}}

    top_k: int = option(2, 1)
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
    def learns_routing(self) -> bool:
        """Unless the router is frozen at its random start."""
        return self.train_router

    def __post_init__(self) -> None:
        super().__post_init__()
        check_renormalize(self.renormalize, self.top_k)
        for name in (*LOSS_WEIGHTS, 'bias_update_rate'):
            valid = self.train_router or getattr(self, name) == 0
            self.require(name, valid, '0 with train_router=False')
        valid = self.load_weight == 0 or self.router_noise > 0
        self.require('load_weight', valid, '0 when router_noise=0, which defines the load loss')
        capped = self.capacity_factor is not None or self.eval_capacity_factor is not None
        valid = capped or not self.batch_prioritized
        self.require('batch_prioritized', valid, 'False unless a capacity_factor is set')


class SMoERouter(LossFreeRouter):
    """Softmax top-k router, V-MoE (2)."""

    config: SMoEConfig

    def __init__(
        self, in_features: int, config: SMoEConfig, host: Host | None = None, **factory: Any
    ) -> None:
        super().__init__(config, **factory)
        self.has_losses = any(getattr(config, name) > 0 for name in LOSS_WEIGHTS)
        self.weight = nn.Parameter(torch.empty(config.num_experts, in_features, **factory))
        bias = torch.empty(config.num_experts, **factory)
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
            probs = probabilities(noisy)
            # by logit: small probabilities underflow to equals
            indices = self.choose(noisy, probs)
            weights = probs.gather(1, indices)
            kept = self._within_capacity(indices, weights)
            if config.renormalize:
                weights = renormalized(weights)
            terms = losses.weighted(
                self,
                importance=lambda: losses.importance(
                    probs if noisy is logits else probabilities(logits)  # without noise the same
                ),
                load=lambda: losses.load(logits, noisy, self.noise_std(), config.top_k),
                balance=lambda: losses.load_balance(probs, indices),
                z=lambda: losses.router_z(logits),
            )
        return Routing(indices, weights, terms, kept=kept)

    def noise_std(self) -> float:
        """Standard deviation of the noise in logits."""
        return self.config.router_noise / self.config.num_experts

    def _within_capacity(self, indices: Tensor, weights: Tensor) -> Tensor | None:
        config = self.config
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if factor is None:
            return None
        # a tensor, as no file of torch.export holds math.ceil of a batch of any size
        assigned = torch.scalar_tensor(indices.numel(), dtype=torch.float64)
        # of a factor beyond all bounds int64 would make a negative number
        capacity = (assigned * factor / config.num_experts).ceil().minimum(assigned).long()
        priority = weights[:, 0] if config.batch_prioritized else None
        return within_capacity(indices, config.num_experts, capacity, priority)
