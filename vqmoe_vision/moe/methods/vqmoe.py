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

Where we differ: fed the code itself (3), with M = E every expert maps its one code to one constant;
`expert_input` has other readings, see `_quantizer.py`. The paper's gate states no right-hand side
for g_c + g_d; softmax is the authors' code. (6) uses means over tokens and channels, as their code
does; a squared norm is D times larger. Their balance loss is always zero by mistake; ours has
`balance_weight`. Their top-1 weight is always one, which leaves the router untrained; ours is the
probability, as (2) says, and starts as SMoE's. The code vector passes a LayerNorm of its own before
the expert (`input_norm`); their second norm, after the expert, is `output_norm`. The default
codebook is an EMA codebook with a data-dependent start and replacement of dead codes: the paper's
own (`codebook='plain'`) collapses on tokens with a common mean. `diversity_weight` is not theirs.

Preset 'official' is the released code; docs/methods.md names what it lacks of it.

Legend: B images, N tokens per image, T = B * N, D width, E experts, M codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..branches import Branch, branch_statistics, run_branches
from ..codebook import Quantized
from ..experts import Experts
from ..joint_losses import Loss
from ..layer import Decisions, MoeLayer
from ..losses import diversity, token_mean
from ..raw_patches import Host
from ..routing import full_precision
from ._continuous_router import ContinuousRouter
from ._quantizer import Quantizer
from ._vqmoe_config import VQMoEConfig

# What the full form has and the discrete one has not.
_OF_FULL = {'router.weight', 'gate.weight', 'gate.bias'}


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
        balanced = self.router is not None and self.router.has_losses
        self.needs_collecting = discrete or balanced
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
                losses |= self._code_losses(precise, quantized)
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

    def _code_losses(self, tokens: Tensor, quantized: Quantized) -> dict[str, Loss]:
        config = self.config
        terms: dict[str, Loss] = {'vq': config.vq_weight * quantized.loss}
        if config.diversity_weight > 0:
            assert self.quantizer is not None
            probs = self.quantizer.codebook.soft_assignment(tokens)
            terms['diversity'] = config.diversity_weight * diversity(probs)
        return config.balanced(terms)

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

    def moves_state(self) -> bool:
        """Whether the codebook learns from what it observes."""
        return self.quantizer is not None and self.quantizer.codebook.moves()

    def discard(self) -> None:
        """Let the codebook forget what it observed."""
        if self.quantizer is not None:
            self.quantizer.codebook.discard()

    @property
    def experts_per_token(self) -> float:
        """One per branch."""
        return (self.router is not None) + (self.quantizer is not None)

    def omitted(self, names: Iterable[str]) -> set[str]:
        """Router and gate of a full form, all of them: the discrete form does without."""
        names = set(names)
        full = any(name.startswith('quantizer.') for name in names)
        found = {name for name in names if name.startswith(('router.', 'gate.'))}
        return found if self.router is None and full and found == _OF_FULL else set()

    def check_discrete(self) -> None:
        """The continuous form has none."""
        if self.quantizer is None:
            raise ValueError(f'form={self.config.form!r} has no discrete branch to keep')

    def to_discrete(self) -> dict[str, Any]:
        """Form 'discrete' (5), equal to the full form (4) with g(x)_d = 1: router and gate go."""
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
        config.routed_scaling_factor,
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
