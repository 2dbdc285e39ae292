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

Readings. The paper feeds the code itself to the expert (3); with M = E every expert then maps its
one code to one constant. The authors' code feeds almost the token and lets the code decide only
which expert. Both, and what lies between, are values of `expert_input`, with c = `code_share`:

    'mix'       (1 - c) x + c v     gradient 1 with respect to x
    'ste'       v                   equation (3), straight through: gradient 1
    'official'  (1 - 2c) x + c v    the value and gradient (1 - c) of the authors' code
    'token'     x                   the code is only an index

The default was chosen by measurement, see docs/results.md.

Where we differ: the paper's gate states no right-hand side for g_c + g_d, we follow the authors'
code (softmax). (6) uses means over tokens and channels, as their code does; a squared norm is D
times larger. Their balance loss is always zero by mistake; ours is added with `balance_weight`, and
their top-1 weight is always one, which leaves the router untrained; ours is the probability, as (2)
says. The code vector passes a LayerNorm of its own before the expert (`input_norm`); their second
norm, after the expert, is `output_norm`. The default codebook is an EMA codebook with a
data-dependent start and replacement of dead codes, as the paper's own collapses on tokens with a
common mean (`codebook='plain'`).

The 'official' preset follows the authors' code as released: untrained router, plain codebook,
0.90 x + 0.05 v, norms on both sides. Of theirs it lacks the unit-length rows of the frozen router,
ReLU in the experts, and the one weight that their two norms share.

Legend: T tokens, D width, E experts, K = 1 router experts, M codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..codebook import Quantized
from ..codebook_learning import CODEBOOKS
from ..collect import MoeLayer, in_recomputation
from ..config import MoeConfig, check, check_unused, check_weights
from ..dispatch import combine, gather
from ..experts import Experts
from ..grouped_linear import compute_dtype
from ..layer import record_routing
from ..plan import make_plan
from ..routing import Routing, expert_load, full_precision, top_k_experts

FORMS = ('full', 'discrete', 'continuous')
EXPERT_INPUTS = ('mix', 'ste', 'official', 'token')


@dataclass(frozen=True, kw_only=True)
class VQMoEConfig(MoeConfig):
    """Options of VQMoE.

    Args:
        form: 'full' (4), 'discrete' (5), or 'continuous', the router branch alone for diagnosis.
        num_codes: M, a multiple of `num_experts`; None gives one code per expert.
        codebook: 'ema', 'gradient' (both with a data-dependent start and replacement of dead
            codes), 'plain' (the paper's), 'simvq' or 'cvq' (which the authors name for unbalanced
            data).
        commitment: beta of (6).
        vq_weight: alpha of (6).
        expert_input: What the discrete branch feeds its expert: 'mix', 'ste', 'official', 'token'.
        code_share: c of 'mix' and 'official'.
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

    form: str = 'full'
    num_codes: int | None = None
    codebook: str = 'ema'
    commitment: float = 0.25
    vq_weight: float = 0.08
    expert_input: str = 'mix'
    code_share: float = 0.05
    input_norm: bool = True
    output_norm: bool = False
    balance_weight: float = 0.01
    train_router: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.form in FORMS, 'form', self.form, f'one of {FORMS}')
        check(self.codebook in CODEBOOKS, 'codebook', self.codebook, f'one of {sorted(CODEBOOKS)}')
        inputs = self.expert_input
        check(inputs in EXPERT_INPUTS, 'expert_input', inputs, f'one of {EXPERT_INPUTS}')
        check(0 <= self.code_share <= 1, 'code_share', self.code_share, 'between 0 and 1')
        check_weights(self, 'commitment', 'vq_weight', 'balance_weight')
        codes = self.num_codes
        check(
            codes is None or (codes >= self.num_experts and codes % self.num_experts == 0),
            'num_codes',
            codes,
            f'a positive multiple of num_experts={self.num_experts}, or None for one per expert',
        )
        self._check_unused()
        check(
            self.train_router or self.balance_weight == 0,
            'balance_weight',
            self.balance_weight,
            '0 with train_router=False',
        )

    def _check_unused(self) -> None:
        if self.form == 'discrete':
            check_unused(self, ['balance_weight', 'train_router'], "form='discrete'")
        if self.form == 'continuous':
            discrete = ['num_codes', 'codebook', 'commitment', 'vq_weight', 'expert_input']
            discrete += ['code_share', 'input_norm', 'output_norm']
            check_unused(self, discrete, "form='continuous'")
        if self.expert_input in ('ste', 'token'):
            check_unused(self, ['code_share'], f'expert_input={self.expert_input!r}')


class ContinuousRouter(nn.Module):
    """Top-1 softmax router of the continuous branch, VQMoE (2).

    Args:
        in_features: D.
        config: Options.
    """

    def __init__(self, in_features: int, config: VQMoEConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        weight = torch.empty(config.num_experts, in_features, **factory)
        self.weight = nn.Parameter(weight, requires_grad=config.train_router)
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal of 0.02."""
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens (T, D) in float32."""
        config, terms = self.config, {}
        with full_precision(x):
            logits = F.linear(x.float(), self.weight.float())
            probs = logits.softmax(dim=-1)
            # by logit: small probabilities underflow to equals
            indices = top_k_experts(logits, 1)[1]
            weights = probs.gather(1, indices)
            if not config.train_router:
                weights = torch.ones_like(weights)
            if self.training and config.balance_weight > 0:
                terms['balance'] = config.balance_weight * losses.load_balance(probs, indices)
        return Routing(indices, weights, terms)


class Quantizer(nn.Module):
    """Discrete branch up to the expert: (3) and the readings of its input.

    Args:
        in_features: D.
        config: Options.
    """

    def __init__(self, in_features: int, config: VQMoEConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        num_codes = config.num_codes or config.num_experts
        codebook = CODEBOOKS[config.codebook]
        self.codebook = codebook(num_codes, in_features, config.commitment, **factory)
        self.norm = nn.LayerNorm(in_features, **factory) if config.input_norm else nn.Identity()

    def forward(self, x: Tensor, precise: Tensor) -> tuple[Tensor, Quantized]:
        """Quantize tokens.

        Args:
            x: (T, D).
            precise: The same in float32.

        Returns:
            What the expert is fed, (T, D), and the quantization.
        """
        quantized = self.codebook(precise)
        code = quantized.codes.to(x.dtype)
        return self.norm(self.expert_input(x, code)), quantized

    def expert_input(self, x: Tensor, code: Tensor) -> Tensor:
        """Input of the expert, before the norm, for tokens and their codes (T, D)."""
        share = self.config.code_share
        match self.config.expert_input:
            case 'mix':
                return torch.add(x, (code - x).detach(), alpha=share)
            case 'ste':
                return x + (code - x).detach()
            case 'official':
                return torch.add((1 - share) * x, (code - x).detach(), alpha=share)
            case _:
                return x


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
        self.router = ContinuousRouter(in_features, config, **factory) if continuous else None
        self.quantizer = Quantizer(in_features, config, **factory) if discrete else None
        normed = discrete and config.output_norm
        self.output_norm = nn.LayerNorm(in_features, **factory) if normed else None
        self.gate = nn.Linear(in_features, 2, **factory) if config.form == 'full' else None
        self.init_weights()

    def init_weights(self) -> None:
        """Gate at zero: both branches count the same at the start."""
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def compute(self, x: Tensor) -> Tensor:
        """Both branches in one dispatch; (B, N, D) -> (B, N, D)."""
        tokens = x.reshape(-1, x.shape[-1])
        precise = tokens.float()  # once for all that decides in float32
        inputs, experts, weights = [], [], []
        if self.router is not None:
            routing = self.router(precise)
            inputs.append(tokens)
            experts.append(routing.indices[:, 0])
            weights.append(routing.weights)
            record_routing(self, routing, self.experts.num_experts)
        if self.quantizer is not None:
            quantized_tokens, quantized = self.quantizer(tokens, precise)
            inputs.append(quantized_tokens)
            experts.append(quantized.indices % self.experts.num_experts)
            weights.append(torch.ones_like(tokens[:, :1], dtype=torch.float32))
            self._record_discrete(precise, quantized)
        gates = self.gates(precise)
        if gates is not None:
            weights = [weight * gates[:, i : i + 1] for i, weight in enumerate(weights)]
            self._record_both(gates, experts)
        return self._run(inputs, experts, weights).view(x.shape)

    def gates(self, tokens: Tensor) -> Tensor | None:
        """g(x) = softmax(W_g x), (T, 2) float32 of continuous and discrete; None in other forms."""
        if self.gate is None:
            return None
        with full_precision(tokens):
            logits = F.linear(tokens.float(), self.gate.weight.float(), self.gate.bias.float())
            return logits.softmax(dim=-1)

    def _run(self, inputs: list[Tensor], experts: list[Tensor], weights: list[Tensor]) -> Tensor:
        # (branches * T) rows in one sort and one pass over the experts' weights
        dtype = compute_dtype(inputs[0])
        plan = make_plan(torch.stack(experts, dim=1).flatten(), self.experts.num_experts, dtype)
        rows = gather(torch.stack([b.to(dtype) for b in inputs], dim=1).flatten(0, 1), plan, 1)
        rows = self.experts(rows, plan.offsets)
        if self.output_norm is None:
            return combine(rows, plan, torch.cat(weights, dim=1))
        positions = plan.inverse.view(-1, len(inputs))
        answers = [rows.index_select(0, positions[:, i]) for i in range(len(inputs))]
        answers[-1] = self.output_norm(answers[-1]).to(rows.dtype)
        pairs = zip(answers, weights, strict=True)
        return torch.stack([answer * weight.to(rows.dtype) for answer, weight in pairs]).sum(dim=0)

    def _record_discrete(self, tokens: Tensor, quantized: Quantized) -> None:
        loss = {'vq': self.config.vq_weight * quantized.loss} if self.training else {}
        stats = {}
        if self.recorder.active and not in_recomputation():
            assert self.quantizer is not None
            codebook = self.quantizer.codebook
            if self.training:
                codebook.observe(tokens, quantized.indices)
            usage = expert_load(quantized.indices, codebook.num_codes)
            stats['code_usage'] = usage
            stats['discrete_load'] = usage.view(-1, self.experts.num_experts).sum(dim=0)
            size = torch.linalg.vector_norm(tokens.detach()).square()
            stats['quantization_error'] = quantized.error * tokens.numel() / size.clamp(min=1e-12)
        self.record(loss, stats)

    def _record_both(self, gates: Tensor, experts: list[Tensor]) -> None:
        if self.recorder.active:
            agreement = losses.token_mean((experts[0] == experts[1]).float())
            gate = losses.token_mean(gates[:, 0].detach())
            self.record({}, {'gate_continuous': gate, 'agreement': agreement})

    def apply_update(self) -> bool:
        """Let the codebook learn from what it observed."""
        return self.quantizer is not None and self.quantizer.codebook.update()

    def discard(self) -> None:
        """Let the codebook forget what it observed."""
        if self.quantizer is not None:
            self.quantizer.codebook.discard()

    def macs(self, num_tokens: int) -> int:
        """Router, code search and gate, and one expert per branch, for every token."""
        width, per_token = self.experts.fc1.in_features, 0
        if self.router is not None:
            per_token += self.router.weight.numel() + self.experts.macs_per_row()
        if self.quantizer is not None:
            search = self.quantizer.codebook.num_codes * width
            per_token += search + self.experts.macs_per_row()
        if self.gate is not None:
            per_token += 2 * width
        return num_tokens * per_token

    def idle_params(self) -> int:
        """All but one expert per branch; two branches may meet in one expert."""
        branches = (self.router is not None) + (self.quantizer is not None)
        idle = max(self.experts.num_experts - branches, 0)
        return idle * self.experts.params_per_expert()

    def no_weight_decay(self) -> set[str]:
        """What the codebook wants left alone."""
        if self.quantizer is None:
            return set()
        names = self.quantizer.codebook.no_weight_decay()
        return {f'quantizer.codebook.{name}' for name in names}


def build(in_features: int, config: VQMoEConfig, experts: Experts, **factory: Any) -> VQMoEMlp:
    """VQMoE layer for tokens of width `in_features`."""
    return VQMoEMlp(in_features, config, experts, **factory)
