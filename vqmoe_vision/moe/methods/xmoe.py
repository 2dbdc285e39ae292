"""XMoE: routing on a low-dimensional hypersphere.

"On the Representation Collapse of Sparse Mixture of Experts" (Chi et al., NeurIPS 2022, arXiv
2204.09179), numbered as there:

    (5)  s_i = cos(W x, e_i),  W of shape (E / 2, D), e_i of width E / 2
    (6)  g(x)_i = softmax(s / tau)_i, or sigmoid(s_i / tau); tau is learned
    (8)  balance = E * sum_i t_i mean_x softmax(s / tau_0)_i, tau_0 fixed, t_i the load share

Where we differ: t_i is the share of assignments, so that (8) is 1 at even routing. tau is kept
positive as exp(log_temperature). `top_k` above 1 selects by the same scores. Embeddings start with
length 1.5, to which torchscale's code brings them in every forward pass: that changes no score, but
how far a step of the optimizer turns them.

Legend: T tokens, D width, E experts, K experts per token, R router width.
"""

import math
from dataclasses import dataclass
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
    directions,
    expert_load,
    full_precision,
    init_orthogonal,
    probabilities,
    renormalized,
)

# gate form -> (initial gate temperature, fixed balance temperature), section 4.1 of the paper
_TEMPERATURES = {'softmax': (0.3, 0.3), 'sigmoid': (0.07, 0.07)}


@dataclass(frozen=True, kw_only=True)
class XMoEConfig(BalancedConfig, LossFreeConfig, TopKConfig):
    """Options of XMoE.

    Args:
        gate: The form of (6).
        router_dim: R; in one dimension all experts of a sign would tie. None gives E / 2.
        temperature: Initial tau; None takes the paper's for the gate form.
        learn_temperature: Whether tau is learned.
        balance_temperature: tau_0, fixed; None as with `temperature`.
        normalize_tokens: Put tokens on the hypersphere, not only experts.
        renormalize: Let the weights of the selected experts sum to 1; not with one.
        balance_weight: Weight of (8).

    Preset 'group' is the router of the tables published with VQMoE.
    """

    PRESETS: ClassVar[Named] = {
        'paper': {},
        'matched': {'top_k': 2},
        'group': {
            'top_k': 2,
            'router_dim': 8,
            'temperature': 1.0,
            'learn_temperature': False,
            'normalize_tokens': False,
            'renormalize': True,
            'balance_weight': 0.0,
        },
    }

    # a gate alone is below 1, and one that is made 1 teaches the router nothing
    EXACT_UPCYCLING: ClassVar[Named] = {'renormalize': {'renormalize': True, 'top_k': 2}}

    gate: Literal['softmax', 'sigmoid'] = option('softmax', 'sigmoid')
    router_dim: int | None = option(None, bounds='[2, inf)')
    temperature: float | None = option(None, bounds='(0, 1e6]', of_weights=False)
    learn_temperature: bool = option(True, of_weights=False)
    balance_temperature: float | None = option(
        None, 0.5, bounds='(0, 1e6]', of_weights=False, idle={'balance_weight': 0}
    )
    normalize_tokens: bool = option(True)
    renormalize: bool = option(False)
    balance_weight: float = loss_weight(0.01, balances=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_renormalize(self.renormalize, self.top_k)


class XMoERouter(LossFreeRouter):
    """Cosine router, XMoE (5) to (8)."""

    config: XMoEConfig

    def __init__(
        self, in_features: int, config: XMoEConfig, host: Host | None = None, **factory: Any
    ) -> None:
        super().__init__(config, **factory)
        self.has_losses = config.balance_weight > 0
        dim = config.router_dim or max(config.num_experts // 2, 2)
        gate_default, balance_default = _TEMPERATURES[config.gate]
        self.initial_temperature = config.temperature or gate_default
        self.balance_temperature = config.balance_temperature or balance_default
        self.project = nn.Parameter(torch.empty(dim, in_features, **factory))
        self.expert_embed = nn.Parameter(torch.empty(config.num_experts, dim, **factory))
        log_temperature = torch.empty((), **factory)
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer('log_temperature', log_temperature)
        self.init_weights()

    def init_weights(self) -> None:
        """Projection as timm's linear layers, embeddings orthogonal, each of length 1.5."""
        super().init_weights()
        nn.init.trunc_normal_(self.project, std=0.02)
        init_orthogonal(self.expert_embed)
        with torch.no_grad():
            # as the authors' torchscale, whose every forward pass brings rows back to it
            self.expert_embed.copy_(1.5 * F.normalize(self.expert_embed.float(), dim=-1))
            self.log_temperature.fill_(math.log(self.initial_temperature))

    reset_parameters = init_weights

    def _weights(self, scaled: Tensor, indices: Tensor) -> Tensor:
        """Gates of the chosen experts, (T, K), of cosines over the temperature (T, E)."""
        if self.config.gate == 'softmax':
            weights = probabilities(scaled).gather(1, indices)
            return renormalized(weights) if self.config.renormalize else weights
        chosen = scaled.gather(1, indices)
        if self.config.renormalize:
            # at a small temperature all gates of a token may round to 0, but not their ratios
            return F.logsigmoid(chosen).softmax(dim=-1)
        return chosen.sigmoid()

    def scores(self, x: Tensor) -> Tensor:
        """Cosine (5) of tokens (T, D) with the experts, (T, E) float32 in [-1, 1]."""
        tokens = F.linear(x.float(), self.project.float())
        if self.config.normalize_tokens:
            # eps keeps an all-zero token finite, in value and gradient
            tokens = directions(tokens, eps=1e-4)
        return F.linear(tokens, directions(self.expert_embed.float(), eps=1e-4))

    def forward(self, x: Tensor) -> Routing:
        """Route tokens (T, D) in float32."""
        with full_precision(x):
            scores = self.among_on(self.scores(x))
            scaled = scores * torch.exp(-self.log_temperature.float())
            # by score: gates near 1 or 0 round to equals, in the sigmoid form from the start
            indices = self.choose(scores, scores)
            weights = self._weights(scaled, indices)
            fixed = self.balance_temperature  # tau_0
            load = expert_load(indices, self.config.num_experts) if self.training else None
            terms = losses.weighted(
                self,
                balance=lambda: losses.load_balance(probabilities(scores / fixed), indices, load),
            )
        return Routing(indices, weights, terms, load=load)

    def no_weight_decay(self) -> set[str]:
        """The expert embeddings: only their direction counts."""
        return {'expert_embed'}
