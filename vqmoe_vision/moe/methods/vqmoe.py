"""VQMoE: a router branch and a vector-quantized branch over the same experts.

"On the Effectiveness of Discrete Representations in Sparse Mixture of Experts" (Do et al., arXiv
2411.19402; TMLR 2025 as "On the Role of Discrete Representation in Sparse Mixture of Experts").
For one token x with experts f_1 .. f_E and codes v_1 .. v_M:

    (1)  f_SMoE(x) = sum_i r(x)_i f_i(x)
    (2)  r(x) = TopK(softmax(W_e x)), K = 1             continuous branch
    (3)  q = argmin_j |x - v_j|,  x~ = v_q              vector quantization
    (4)  y = g(x)_c f_SMoE(x) + g(x)_d f_q(x~),         g(x) = softmax(W_g x), form 'full'
    (5)  y = f_q(x~)                                    form 'discrete': fine-tuning, inference
    (6)  L = L_task + alpha (|sg[x] - v_q|^2 + beta |x - sg[v_q]|^2)

One codebook; code q belongs to expert q mod E. The full form computes two experts per token, as a
top-2 router does; the discrete form computes one.

The paper feeds the code itself to the expert (3); with M = E every expert then maps its one code to
one constant. That and other readings are values of `expert_input`, see `_quantizer.py`; the default
was chosen by measurement, see docs/results.md.

Where we differ: the paper's gate states no right-hand side for g_c + g_d, we follow the authors'
code (softmax). (6) uses means over tokens and channels, as their code does; a squared norm is D
times larger. Their balance loss is always zero by mistake; ours is added with `balance_weight`, and
their top-1 weight is always one, which leaves the router untrained; ours is the probability, as (2)
says, and starts as SMoE's. The code vector passes a LayerNorm of its own before the expert
(`input_norm`); their second norm, after the expert, is `output_norm`. The default codebook is an
EMA codebook with a data-dependent start and replacement of dead codes, as the paper's own collapses
on tokens with a common mean (`codebook='plain'`).

The 'official' preset is the released code; docs/methods.md names what it lacks of it.

Legend: T tokens, D width, E experts, M codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..branches import Branch, branch_statistics, run_branches
from ..config import BalancedConfig, MoeConfig, check_weights
from ..experts import Experts
from ..host import Host
from ..joint_losses import Loss
from ..layer import Decisions, MoeLayer
from ..losses import token_mean
from ..routing import full_precision
from ._codebook_config import CodebookConfig
from ._continuous_router import ContinuousRouter
from ._quantizer import EXPERT_INPUTS, FIXED_SHARES, Quantizer

FORMS = ('full', 'discrete', 'continuous')


@dataclass(frozen=True, kw_only=True)
class VQMoEConfig(BalancedConfig, CodebookConfig):
    """Options of VQMoE, beside those of its codebook.

    Args:
        form: 'full' (4), 'discrete' (5), or 'continuous', the router branch alone for diagnosis.
        num_codes: M, a multiple of `num_experts`; None gives one code per expert.
        vq_weight: alpha of (6).
        expert_input: What the discrete branch feeds its expert: 'mix', 'ste', 'official', 'token'.
        code_share: c of 'mix' and 'official'.
        rotation_trick: Gradients through the code by rotation in place of straight through.
        input_norm: LayerNorm between code and expert.
        output_norm: LayerNorm after the expert of the discrete branch.
        balance_weight: Weight of the router's balance loss.
        train_router: False freezes the router at its random start with weight one.

    Presets: 'paper'; 'matched', the compute of two experts per token, as every row of our
    comparisons has: one by router and one by code; 'official', the released code.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        'paper': {},
        'matched': {},
        'official': {
            'codebook': 'plain',
            'expert_input': 'official',
            'output_norm': True,
            'balance_weight': 0.0,
            'train_router': False,
        },
    }

    TRIALS: ClassVar[dict[str, dict[str, Any]]] = {
        'discrete': {
            'form': 'discrete',
            'commitment': 0.5,
            'code_share': 0.3,
            'use_cosine_sim': True,
            'train_codebook': False,
        },
        'continuous': {'form': 'continuous', 'global_balance': False},
        'gradient': {
            'codebook': 'gradient',
            'num_codes': 48,
            'input_norm': False,
            'ema_decay': 0.9,
            'ema_decay_warmup': True,
            'dead_code_threshold': 0.1,
        },
        'simvq': {
            'codebook': 'simvq',
            'expert_input': 'ste',
            'vq_weight': 0.5,
            'rotation_trick': True,
        },
        'cvq': {'codebook': 'cvq', 'expert_input': 'token'},
    }

    # An expert has to be fed the token alone, as the dense MLP was, and not its norm. The weight of
    # the continuous branch is a probability, below 1, unless its router is frozen.
    EXACT_UPCYCLING: ClassVar[dict[str, dict[str, Any]]] = {
        'discrete': {'form': 'discrete', 'expert_input': 'token', 'input_norm': False},
        'full': {
            'expert_input': 'token',
            'input_norm': False,
            'train_router': False,
            'balance_weight': 0.0,
        },
    }

    NOT_OF_WEIGHTS: ClassVar[frozenset[str]] = frozenset(
        {'form', 'num_codes', 'vq_weight', 'rotation_trick', 'balance_weight'}
    )

    form: str = 'full'
    num_codes: int | None = None
    vq_weight: float = 0.08
    expert_input: str = 'mix'
    code_share: float = 0.05
    rotation_trick: bool = False
    input_norm: bool = True
    output_norm: bool = False
    balance_weight: float = 0.01
    train_router: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require('form', self.form in FORMS, f'one of {FORMS}')
        inputs = self.expert_input
        self.require('expert_input', inputs in EXPERT_INPUTS, f'one of {EXPERT_INPUTS}')
        self.require('code_share', 0 <= self.code_share <= 1, 'between 0 and 1')
        check_weights(self, 'vq_weight', 'balance_weight')
        codes = self.num_codes
        valid = codes is None or (codes >= self.num_experts and codes % self.num_experts == 0)
        multiple = f'a positive multiple of num_experts={self.num_experts}'
        self.require('num_codes', valid, f'{multiple}, or None for one per expert')
        valid = self.train_router or self.balance_weight == 0
        self.require('balance_weight', valid, '0 with train_router=False')

    def unused(self) -> dict[str, str]:
        """What belongs to a branch that the form leaves out, and a share that the reading fixes."""
        unused = super().unused()
        if self.vq_weight == 0:
            unused['commitment'] = 'vq_weight=0'
        if self.expert_input in FIXED_SHARES:
            unused['code_share'] = f'expert_input={self.expert_input!r}'
        if FIXED_SHARES.get(self.expert_input, self.code_share) == 0:
            unused['rotation_trick'] = 'experts that are fed the token alone'
        if self.balance_weight == 0:
            unused['global_balance'] = 'balance_weight=0'
        if self.form == 'discrete':
            names = ('balance_weight', 'global_balance', 'train_router')
            unused |= dict.fromkeys(names, "form='discrete'")
        if self.form == 'continuous':
            own = {field.name for field in fields(VQMoEConfig)}
            shared = {field.name for field in fields(MoeConfig)}
            kept = {'form', 'balance_weight', 'global_balance', 'train_router'}
            unused |= dict.fromkeys(sorted(own - shared - kept), "form='continuous'")
        return unused


class VQMoEMlp(MoeLayer):
    """Drop-in for timm's `Mlp`, VQMoE (4) and (5).

    Args:
        in_features: D.
        config: Options.
        experts: The experts that both branches share.
    """

    def __init__(
        self, in_features: int, config: VQMoEConfig, experts: Experts, **factory: Any
    ) -> None:
        super().__init__()
        self.config = config
        self.experts = experts
        continuous, discrete = config.form != 'discrete', config.form != 'continuous'
        self.router = _router(in_features, config, **factory) if continuous else None
        self.quantizer = _quantizer(in_features, config, **factory) if discrete else None
        normed = discrete and config.output_norm
        self.output_norm = nn.LayerNorm(in_features, **factory) if normed else None
        full = config.form == 'full'
        # float when the rest is int8, as a router is
        self.gate = NonDynamicallyQuantizableLinear(in_features, 2, **factory) if full else None
        self.init_weights()

    def init_weights(self) -> None:
        """Gate at zero: both branches count the same at the start."""
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def run(self, x: Tensor) -> Tensor:
        """Both branches in one dispatch; (B, N, D) -> (B, N, D)."""
        tokens = x.flatten(0, 1)
        precise = tokens.float()  # once for all that decides in float32
        branches: list[Branch] = []
        losses: dict[str, Loss] = {}
        stats: dict[str, Tensor] = {}
        decisions: Decisions = {}
        if self.router is not None:
            routing = decisions['router'] = self.router(precise)
            branches.append(Branch(tokens, routing.indices[:, 0], routing.weights))
            losses |= routing.losses
        if self.quantizer is not None:
            inputs, quantized = self.quantizer(tokens, precise)
            decisions['quantizer.codebook'] = quantized
            experts = quantized.indices % self.experts.num_experts
            branches.append(Branch(inputs, experts, torch.ones_like(precise[:, :1])))
            if self.training:
                losses['vq'] = self.config.vq_weight * quantized.loss
            if self.listens:
                stats |= self.quantizer.observe(precise, quantized, x.shape[1])
        gates = self.gates(precise)
        out = run_branches(self.experts, branches, gates, self.output_norm)
        if self.listens:
            stats = {**branch_statistics(self.experts.num_experts, branches), **stats}
            if gates is not None:
                stats['gate_continuous'] = token_mean(gates[:, 0].detach())
        self.record(losses, stats, tokens.shape[0])
        if gates is not None:
            decisions['gates'] = gates
        out = out.view(x.shape)
        self.show(decisions, x, out)
        return out

    def gates(self, tokens: Tensor) -> Tensor | None:
        """g(x) = softmax(W_g x), (T, 2) float32 of continuous and discrete; None in other forms."""
        if self.gate is None:
            return None
        with full_precision(tokens):
            logits = F.linear(tokens.float(), self.gate.weight.float(), self.gate.bias.float())
            return logits.softmax(dim=-1)

    def apply_update(self) -> bool:
        """Let the codebook learn from what it observed."""
        return self.quantizer is not None and self.quantizer.codebook.update()

    def discard(self) -> None:
        """Let the codebook forget what it observed."""
        if self.quantizer is not None:
            self.quantizer.codebook.discard()

    @property
    def experts_per_token(self) -> float:
        """One per branch."""
        return (self.router is not None) + (self.quantizer is not None)

    def omitted(self, names: Iterable[str]) -> set[str]:
        """The discrete form of a layer that was trained in full has no router and no gate."""
        names = set(names)
        full = any(name.startswith('quantizer.') for name in names)
        if self.router is not None or not full:
            return set()
        return {name for name in names if name.startswith(('router.', 'gate.'))}

    def check_discrete(self) -> None:
        """The continuous form has none."""
        if self.quantizer is None:
            raise ValueError(f'form={self.config.form!r} has no discrete branch to keep')

    def to_discrete(self) -> dict[str, Any]:
        """Form 'discrete' (5): the router and the gate go.

        Equal to the full form (4) with g(x)_d = 1.
        """
        self.check_discrete()
        changed: dict[str, Any] = {} if self.config.form == 'discrete' else {'form': 'discrete'}
        self.config = replace(self.config, **changed)
        self.router, self.gate = None, None
        return changed


def _router(in_features: int, config: VQMoEConfig, **factory: Any) -> ContinuousRouter:
    return ContinuousRouter(
        in_features,
        config.num_experts,
        config.balance_weight,
        config.global_balance,
        config.train_router,
        **factory,
    )


def _quantizer(in_features: int, config: VQMoEConfig, **factory: Any) -> Quantizer:
    num_codes = config.num_codes or config.num_experts
    codebook = config.build_codebook(num_codes, in_features, **factory)
    norm = nn.LayerNorm(in_features, **factory) if config.input_norm else nn.Identity()
    return Quantizer(codebook, norm, config.expert_input, config.code_share, config.rotation_trick)


def build(
    in_features: int, config: VQMoEConfig, experts: Experts, host: Host, **factory: Any
) -> VQMoEMlp:
    """VQMoE layer for tokens of width `in_features`."""
    return VQMoEMlp(in_features, config, experts, **factory)
