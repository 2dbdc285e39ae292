"""VQMoE: a router branch and a vector-quantized branch over the same experts.

"On the Role of Discrete Representation in Sparse Mixture of Experts" (Do et al., TMLR 2025,
arXiv 2411.19402). For one token x with experts f_1 .. f_E and codes v_1 .. v_M:

    (1)  f_SMoE(x) = sum_i r(x)_i f_i(x)
    (2)  r(x) = TopK(softmax(W_e x)), K = 1             continuous branch
    (3)  q = argmin_j |x - v_j|,  x~ = v_q              vector quantization
    (4)  y = g(x)_c f_SMoE(x) + g(x)_d f_q(x~),         g(x) = softmax(W_g x), form 'full'
    (5)  y = f_q(x~)                                    form 'discrete': fine-tuning, inference
    (6)  L = L_task + alpha (|sg[x] - v_q|^2 + beta |x - sg[v_q]|^2)

Code q belongs to expert q mod E. The full form computes two experts per token, as a top-2 router
does; the discrete form computes one.

Where we differ: fed the code itself (3), with M = E every expert maps its one code to one constant;
`expert_input` has other readings, see `Quantizer`. (6) uses means over tokens and channels, as the
authors' code; a squared norm is D times larger. Their balance loss is always zero by mistake, and
their top-1 weight one, which leaves the router untrained; ours is E / 2 times that of (2).

By default codes lie in a learned space of few channels (codebooks/projected.py): an expert is fed
the token, and (6) has nothing to learn. Codes of the tokens themselves, found by k-means, are the
preset 'ema': they pass a LayerNorm before the expert (`input_norm`), and dead ones are replaced.
The paper's own ('plain') collapse on tokens with a common mean.

Preset 'official' is the released code; docs/explanation/methods.md names what it lacks of it.

Legend: B images, N tokens per image, T = B * N, D width, E experts, M codes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from .. import losses
from ..codebooks import Codebook, Quantized, rotate_to
from ..codebooks.ema import CODEBOOKS, update_together
from ..codebooks.usage import CodeUsage
from ..config import BalancedConfig, Named, loss_weight, option
from ..dispatch import Branch, run_branches
from ..experts import Experts
from ..layer import Decisions, MoeLayer
from ..losses import BalanceLoss, Loss, token_mean
from ..raw_patches import Host
from ..routing import (
    Router,
    Routing,
    expert_load,
    full_precision,
    init_lecun_normal,
    probabilities,
    top_k_experts,
)
from ..valid import ValidTokens

FIXED_SHARES = {'ste': 1.0, 'token': 0.0}
# What the full form has and the discrete one has not.
_OF_FULL = {'router.weight', 'gate.weight', 'gate.bias'}
# Where options of the branches have no effect.
_NO_CODES = {'form': 'continuous'}
_NO_ROUTER = {'form': 'discrete'}
_OF_GRADIENT = 'plain', 'simvq', 'projected'  # codebooks that do not learn from usage
_PROJECTED = {**_NO_CODES, 'codebook': 'projected'}
_NOT_FULL = {'form': ('discrete', 'continuous')}
# The weight of the router is its probability, and no token is kept from it.
_OF_PROBABILITY = {'routed_scaling_factor': 1.0, 'router_drop': 0.0}
_PLAIN = {'codebook': 'plain', 'balance_weight': 0.0}
_FROZEN = {'train_router': False, 'balance_weight': 0.0}
# An expert has to be fed the token alone, as the dense MLP was, and not its norm.
_AS_DENSE = {'preset': 'ema', 'expert_input': 'token', 'input_norm': False}


def _with_ema(**options: Any) -> dict[str, Any]:
    """Return a trial of options that have no effect with the default codebook."""
    return {'codebook': 'ema', **options}


@dataclass(frozen=True, kw_only=True)
class VQMoEConfig(BalancedConfig):
    """Options of VQMoE; docs/explanation/methods.md has what was measured.

    Args:
        form: 'full' (4), 'discrete' (5), or 'continuous', the router branch alone for diagnosis.
        num_codes: M, a multiple of `num_experts`; None gives one code per expert.
        codebook: 'projected' learns from the task in a space of its own, 'ema' starts by k-means
            and replaces dead codes, and 'plain' is VQ-VAE's.
        code_dim: R, the channels of that space.
        vq_weight: alpha of (6).
        commitment: beta of (6).
        use_cosine_sim: Compare tokens and codes by direction: both are made of length one.
        ema_decay: Of the averages of 'ema' and 'cvq'.
        dead_code_threshold: Share of even usage under which 'ema' replaces a code; 0 is never.
        train_codebook: False keeps the codes as they are; tokens are still drawn to them.
        expert_input: What the discrete branch feeds its expert.
        code_share: c of 'mix' and 'official'.
        rotation_trick: Gradients through the code by rotation in place of straight through.
        input_norm: LayerNorm between code and expert.
        output_norm: LayerNorm after the expert of the discrete branch.
        balance_weight: Weight of the balance losses of the router and of 'projected' codes.
        diversity_weight: Weight of a loss that evens the use of codes (wav2vec 2.0).
        train_router: False freezes the router at its random start with weight one.
        routed_scaling_factor: Of the router's weight, not of losses; None is E / 2.
        router_drop: Share of tokens that training sends to the code's expert alone, as the
            discrete form does.

    Presets: 'paper', equations (1) to (6) with nothing added; 'matched', the defaults; 'official',
    the released code; 'ema', the defaults until December 2026, with codes of the tokens themselves.
    """

    PRESETS: ClassVar[Named] = {
        # weights of (6) are those of the released code, as the text does not give them
        'paper': {**_PLAIN, **_OF_PROBABILITY, 'expert_input': 'ste', 'input_norm': False},
        'matched': {},
        'official': {
            **_PLAIN,
            'expert_input': 'official',
            'output_norm': True,
            'train_router': False,
            'router_drop': 0.0,
        },
        'ema': {'codebook': 'ema', **_OF_PROBABILITY},
    }
    FORMER_PRESETS: ClassVar[dict[str | None, str]] = {None: 'ema', 'matched': 'ema'}
    # The weight of the continuous branch is a probability times a factor, unless its router is
    # frozen.
    EXACT_UPCYCLING: ClassVar[Named] = {
        'discrete': {'form': 'discrete'},
        'full': _FROZEN,
        'discrete, ema': {'form': 'discrete', **_AS_DENSE},
        'full, ema': {**_AS_DENSE, **_FROZEN},
    }

    form: Literal['full', 'discrete', 'continuous'] = option(
        'full', 'discrete', 'continuous', of_weights=False
    )
    num_codes: int | None = option(None, 48, bounds='[1, inf)', of_weights=False, idle=_NO_CODES)
    codebook: Literal['ema', 'plain', 'simvq', 'cvq', 'projected'] = option(
        'projected', 'ema', 'simvq', 'cvq', idle=_NO_CODES
    )
    code_dim: int = option(
        24,
        3,
        bounds='[2, inf)',
        of_weights=False,
        idle={**_NO_CODES, 'codebook': ('ema', 'plain', 'simvq', 'cvq')},
    )
    vq_weight: float = loss_weight(0.08, _with_ema(vq_weight=0.5), idle=_PROJECTED)
    commitment: float = loss_weight(
        0.25, _with_ema(commitment=0.5), idle={**_PROJECTED, 'vq_weight': 0}
    )
    use_cosine_sim: bool = option(False, _with_ema(use_cosine_sim=True), idle=_PROJECTED)
    ema_decay: float = option(
        0.99,
        _with_ema(ema_decay=0.9),
        bounds='[0, 1)',
        of_weights=False,
        idle={**_NO_CODES, 'codebook': _OF_GRADIENT, 'train_codebook': False},
    )
    dead_code_threshold: float = option(
        0.01,
        _with_ema(dead_code_threshold=0.1),
        bounds='[0, 1)',
        of_weights=False,
        idle={**_NO_CODES, 'codebook': (*_OF_GRADIENT, 'cvq'), 'train_codebook': False},
    )
    train_codebook: bool = option(
        True, {'train_codebook': False, 'form': 'discrete'}, of_weights=False, idle=_NO_CODES
    )
    expert_input: Literal['mix', 'ste', 'token', 'official'] = option(
        'mix', _with_ema(expert_input='ste'), _with_ema(expert_input='token'), idle=_PROJECTED
    )
    code_share: float = option(
        0.05,
        _with_ema(code_share=0.3),
        bounds='[0, 1]',
        idle={**_PROJECTED, 'expert_input': (*FIXED_SHARES,)},
    )
    rotation_trick: bool = option(
        False, _with_ema(rotation_trick=True), of_weights=False, idle=_PROJECTED
    )
    input_norm: bool = option(True, _with_ema(input_norm=False), idle=_PROJECTED)
    output_norm: bool = option(False, True, idle=_NO_CODES)
    balance_weight: float = loss_weight(0.01, 0.0, balances=True)
    diversity_weight: float = loss_weight(0.0, 0.1, balances=True, idle=_NO_CODES)
    train_router: bool = option(True, idle=_NO_ROUTER)
    routed_scaling_factor: float | None = option(
        None, 2.75, bounds='(0, 1e6]', idle={**_NO_ROUTER, 'train_router': False}
    )
    router_drop: float = option(0.3, 0.0, bounds='[0, 1)', of_weights=False, idle=_NOT_FULL)

    @property
    def learns_routing(self) -> bool:
        """By codes, too, which are learned whatever becomes of the router."""
        return self.form != 'continuous' or self.train_router

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = f'a multiple of num_experts={self.num_experts}, or None for one per expert'
        self.require('num_codes', (self.num_codes or 0) % self.num_experts == 0, allowed)
        valid = self.train_router or self.balance_weight == 0
        self.require('balance_weight', valid, '0 with train_router=False')

    @override
    def unused(self) -> dict[str, str]:
        found = super().unused()
        if self.form == 'discrete' and self.codebook != 'projected':
            found['balance_weight'] = f'form={self.form!r} and codebook={self.codebook!r}'
            found |= self._idle_balance(found)
        if self.commitment == 0 and self.vq_weight > 0:
            if not self.train_codebook:
                found.setdefault('vq_weight', 'commitment=0 and train_codebook=False')
            elif CODEBOOKS[self.codebook].codebook_scale == 0:
                found.setdefault('vq_weight', f'commitment=0 and codebook={self.codebook!r}')
        if FIXED_SHARES.get(self.expert_input, self.code_share) == 0:
            found.setdefault('rotation_trick', 'experts that are fed the token alone')
        return found


class ContinuousRouter(Router):
    """Equation (2): the most probable expert, by its probability.

    Of eight experts it is 0.36 at the start, where a code's expert has the weight 1.
    `routed_scaling_factor` evens that, as in DeepSeek-V2 (arXiv 2405.04434), which does not
    renormalise either: renormalised, one weight is 1, as if the router were not trained.
    """

    experts_per_token: float = 1  # `torch.jit.trace` reads every attribute

    def __init__(self, in_features: int, config: VQMoEConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.has_losses = config.balance_weight > 0
        self.weight = nn.Parameter(torch.empty(config.num_experts, in_features, **factory))
        self.weight.requires_grad_(config.train_router)
        self.init_weights()

    def init_weights(self) -> None:
        """As SMoE's."""
        init_lecun_normal(self.weight)

    reset_parameters = init_weights

    def used_weight(self) -> Tensor:
        """(E, D) float32."""
        # detached: a fine-tuning may freeze and unfreeze a model as a whole
        return (self.weight if self.config.train_router else self.weight.detach()).float()

    def forward(self, x: Tensor, logits: Tensor | None = None) -> Routing:
        """Route tokens (T, D) in float32, maybe by logits (T, E) that are known."""
        config = self.config
        with full_precision(x):
            if logits is None:
                logits = F.linear(x.float(), self.used_weight())
            logits = self.among_on(logits)
            probs = probabilities(logits)
            # by logit: small probabilities underflow to equals
            indices = top_k_experts(logits, 1)[1]
            weights = probs.gather(1, indices)
            factor = config.routed_scaling_factor
            factor = config.num_experts / 2 if factor is None else factor
            if factor != 1:
                weights = factor * weights
            load = expert_load(indices, config.num_experts) if self.training else None
            terms = losses.weighted(self, balance=lambda: losses.load_balance(probs, indices, load))
        if not config.train_router:
            weights = torch.ones_like(weights)
        return Routing(indices, weights, terms, load=load)


class Quantizer(nn.Module):
    """Equation (3) and its readings: tokens to their codes, and to what an expert is fed.

    The paper feeds the code v itself to the expert, the authors' code almost the token x:
    `expert_input` has both and more, with c = `code_share`.

        'mix'       (1 - c) x + c v     gradient 1 with respect to x
        'ste'       v                   'mix' with c = 1: equation (3), straight through
        'token'     x                   'mix' with c = 0: the code is only an index
        'official'  (1 - 2c) x + c v    the value and gradient (1 - c) of the authors' code

    Gradients are straight through the code: as if v were x. With `rotation_trick` v has the
    gradient of x turned onto it, see `rotate_to`.
    """

    codebook: Codebook

    def __init__(self, in_features: int, config: VQMoEConfig, **factory: Any) -> None:
        super().__init__()
        kind = CODEBOOKS[config.codebook]
        options = {name: getattr(config, name) for name in kind.OPTIONS}
        num_codes = config.num_codes or config.num_experts
        self.codebook = kind(num_codes, in_features, **options, **factory)
        if not config.train_codebook:
            self.codebook.freeze()
        # codes of a space of their own are no input of an expert
        fed = config.codebook != 'projected'
        norms = fed and config.input_norm
        self.norm = nn.LayerNorm(in_features, **factory) if norms else nn.Identity()
        self.reading = config.expert_input if fed else 'token'
        self.rotation_trick = config.rotation_trick
        self.code_share = FIXED_SHARES.get(self.reading, config.code_share)

    def forward(self, x: Tensor, precise: Tensor) -> tuple[Tensor, Quantized]:
        """Quantize tokens (T, D), and the same in float32; first comes what the expert is fed."""
        quantized = self.codebook(precise)
        return self.norm(self.expert_input(x, quantized.codes.to(x.dtype))), quantized

    def expert_input(self, x: Tensor, code: Tensor) -> Tensor:
        """What the expert is fed for tokens (T, D) and their codes (T, D), before the norm."""
        share, official = self.code_share, self.reading == 'official'
        if share == 0:
            return x
        if self.rotation_trick:
            of_token = 1 - 2 * share if official else 1 - share
            return torch.add(of_token * x, rotate_to(x, code.detach()), alpha=share)
        if share == 1 and not official:
            # exactly the code, in half precision too, and the gradient of the token
            return code.detach() + (x - x.detach())
        return torch.add(((1 - share) * x if official else x), (code - x).detach(), alpha=share)

    def observe(self, tokens: Tensor, quantized: Quantized, per_image: int) -> dict[str, Tensor]:
        """Statistics of tokens (T, D) float32; a codebook in training sees them."""
        energy = self.codebook.energy(tokens)
        stats = {
            'code_usage': expert_load(quantized.indices, self.codebook.num_codes),
            # of the tokens' energy
            'quantization_error': quantized.error / energy.clamp(min=1e-20),
        }
        if self.training and not self.codebook.frozen:
            left_out = self.codebook.observe(tokens, quantized.indices, per_image)
            if left_out is not None:
                stats['nonfinite_tokens'] = left_out
        return stats


class VQMoEMlp(MoeLayer):
    """Drop-in for timm's `Mlp`, VQMoE (4) and (5).

    Args:
        in_features: D.
        config: Options.
        experts: The experts that both branches share.
        host: Unused.
    """

    def __init__(
        self,
        in_features: int,
        config: VQMoEConfig,
        experts: Experts,
        host: Host | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.config, self.experts = config, experts
        continuous, discrete = config.form != 'discrete', config.form != 'continuous'
        self.router = ContinuousRouter(in_features, config, **factory) if continuous else None
        self.quantizer = Quantizer(in_features, config, **factory) if discrete else None
        normed, full = discrete and config.output_norm, continuous and discrete
        self.output_norm = nn.LayerNorm(in_features, **factory) if normed else None
        # float when the rest is int8, as a router is
        self.gate = NonDynamicallyQuantizableLinear(in_features, 2, **factory) if full else None
        learns_apart = discrete and config.codebook != 'projected'
        self.needs_collecting = learns_apart or config.balance_weight > 0
        self.init_weights()

    def init_weights(self) -> None:
        """Gate at zero: both branches count the same at the start."""
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def run(self, x: Tensor) -> Tensor:
        """Both branches in one dispatch; (B, N, D) -> (B, N, D)."""
        config, tokens = self.config, x.flatten(0, 1)
        precise = tokens.float()  # once for all that decides in float32
        branches: list[Branch] = []
        terms: dict[str, Loss] = {}
        stats: dict[str, Tensor] = {}
        decisions: Decisions = {}
        of_router, of_gate = self._logits(precise)
        if self.router is not None:
            routing = decisions['router'] = self.router(precise, of_router)
            branches.append(Branch(tokens, routing.indices[:, 0], routing.weights))
            terms |= routing.losses
        if self.quantizer is not None:
            inputs, quantized = self.quantizer(tokens, precise)
            decisions['quantizer.codebook'] = quantized
            experts = quantized.indices
            if self.quantizer.codebook.num_codes > self.experts.num_experts:
                experts = quantized.indices % self.experts.num_experts
            weights = quantized.weights
            weights = torch.ones_like(precise[:, :1]) if weights is None else weights
            branches.append(Branch(inputs, experts, weights))
            if self.training and quantized.probs is not None and config.balance_weight > 0:
                chosen = quantized.indices[:, None]
                balance = losses.load_balance(quantized.probs, chosen)
                terms['code_balance'] = config.balance_weight * balance
            if self.training and config.codebook != 'projected':
                terms['vq'] = BalanceLoss(quantized.loss, losses.itself, config.vq_weight)
            if self.training and config.diversity_weight > 0:
                probs = self.quantizer.codebook.soft_assignment(precise)
                terms['diversity'] = config.diversity_weight * losses.diversity(probs)
            if self.listens:
                stats |= self.quantizer.observe(precise, quantized, x.shape[1])
        gates = None if of_gate is None else probabilities(of_gate)
        if gates is not None and self.training and config.router_drop > 0:
            dropped = torch.rand_like(gates[:, :1]) < config.router_drop
            gates = torch.where(dropped, torch.arange(2.0, device=gates.device), gates)  # (0, 1)
        out = run_branches(self.experts, branches, gates, self.output_norm).view(x.shape)
        if self.listens:
            stats = {'load': self._load(decisions, stats), **stats}
        if gates is not None:
            decisions['gates'] = gates
            if self.listens:
                first, second = (branch.experts for branch in branches)
                stats['agreement'] = token_mean(first == second, torch.float32)
                stats['gate_continuous'] = token_mean(gates[:, 0].detach())
        self.record(losses.balanced(terms, config.global_balance), stats, tokens.shape[0])
        self.show(decisions, x, out)
        return out

    def _load(self, decisions: Decisions, stats: dict[str, Tensor]) -> Tensor:
        """Share of assignments of each expert, (E,): the mean of the branches'."""
        loads, number = [], self.experts.num_experts
        if isinstance(routing := decisions.get('router'), Routing):
            known = routing.load
            loads.append(expert_load(routing.indices, number) if known is None else known)
        if self.quantizer is not None:  # code q belongs to expert q mod E
            codes = stats['code_usage'].unflatten(0, (-1, number))
            loads.append(codes.sum(dim=0) if len(codes) > 1 else codes[0])
        return loads[0] if len(loads) == 1 else loads[0].lerp(loads[1], 0.5)

    def run_valid(self, x: Tensor, valid: ValidTokens) -> Tensor:
        """As `MoeLayer`."""
        return valid.one_by_one(self.run, x)

    def _logits(self, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of router (T, E) and of g(x) (T, 2) by one product in float32; None in other forms."""
        if self.gate is None or self.router is None:
            return None, None
        with full_precision(tokens):
            own = self.router.used_weight()
            weight = torch.cat([own, self.gate.weight.float()])
            of_router, of_gate = F.linear(tokens, weight).split([len(own), 2], dim=1)
            return of_router, of_gate + self.gate.bias.float()

    @property
    def experts_per_token(self) -> float:
        """One per branch."""
        return (self.router is not None) + (self.quantizer is not None)

    # --- the codebook's state

    def apply_update(self) -> bool:
        """Let the codebook learn from what it observed."""
        return self.apply_updates([self])[0]

    @classmethod
    def apply_updates(cls, layers: Sequence['VQMoEMlp']) -> list[bool]:
        """As `apply_update`; codebooks learn together."""
        books = [None if layer.quantizer is None else layer.quantizer.codebook for layer in layers]
        found = update_together([book for book in books if book is not None])
        return [book is not None and found.pop(0) for book in books]

    def moves_state(self) -> bool:
        """Whether the codebook learns from what it observes."""
        return self.quantizer is not None and self.quantizer.codebook.moves()

    @property
    def observed(self) -> dict:
        """The codebook's."""
        pending = None if self.quantizer is None else self.quantizer.codebook.pending
        return {} if pending is None else dict(vars(pending))

    @observed.setter
    def observed(self, kept: dict) -> None:
        if self.quantizer is not None:
            device = next(self.parameters()).device
            moved: Any = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kept.items()}
            self.quantizer.codebook.pending = CodeUsage(**moved) if moved else None

    # --- the discrete form

    def omitted(self, names: Iterable[str]) -> set[str]:
        """Router and gate of a full form, all of them: the discrete form does without."""
        names = set(names)
        full = any(name.startswith('quantizer.') for name in names)
        found = {name for name in names if name.startswith(('router.', 'gate.'))}
        return found if self.router is None and full and found == _OF_FULL else set()

    @property
    def has_discrete(self) -> bool:
        """Unless it has the continuous form."""
        return self.quantizer is not None

    def to_discrete(self) -> dict:
        """Form 'discrete' (5), equal to the full form (4) with g(x)_d = 1: router and gate go."""
        if not self.has_discrete:
            return super().to_discrete()
        changed: dict = {} if self.config.form == 'discrete' else {'form': 'discrete'}
        self.config = replace(self.config, **changed)
        self.router = self.gate = None
        return changed
