"""SoftMoE: every slot of every expert reads a soft mixture of an image's tokens.

"From Sparse to Soft Mixtures of Experts" (Puigcerver et al., ICLR 2024, arXiv 2308.00951),
numbered as there, per image X (N, D) with parameters Phi (D, S), S = E * P slots:

    L = l2norm(X) (scale * l2norm(Phi))                algorithm 2, section 2.3
    (1)  D = softmax of L over tokens,  X~ = D^T X      (X itself, not normalised)
    (2)  C = softmax of L over slots,   Y = C Y~,       Y~_s = expert_{s // P}(X~_s)

There is no auxiliary loss; an image never sees another.

Where we differ: eight experts and as many slots as tokens (the compute of the dense MLP); the paper
has 128 experts with one slot in the last half of the blocks. P is fixed when the layer is built,
whatever the resolution. Preset 'lucidrains' is the PyTorch variant that published baselines may
rest on: RMS norm with gain sqrt(D) on both sides instead of l2norm (logits about D times larger),
and experts fed the normalised tokens.

Norms and softmaxes are float32. The product of unit vectors L is computed as the experts are: in
bfloat16 the layer's rounding error stays at 0.3 % (0.8 % instead of 0.4 % at a scale of 50, 3 % at
one of 1,000). The large logits of 'lucidrains' stay float32: 2.8 % instead of 0.5 %.

Legend: B images, N tokens per image, D width, E experts, P slots per expert, S = E * P slots.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MoeConfig, Named, option
from ..dispatch import run_experts_evenly
from ..experts import Experts
from ..kernels import compute_dtype
from ..layer import MoeLayer
from ..raw_patches import Host
from ..routing import directions, full_precision
from ..valid import ValidTokens


@dataclass(frozen=True, kw_only=True)
class SoftMoEConfig(MoeConfig):
    """Options of SoftMoE.

    Args:
        slots_per_expert: P; None gives about as many slots in all as the model has tokens when it
            is built.
        slots_per_token: Slots in all over the patches at that time, in place of `slots_per_expert`;
            rounded to whole slots per expert.
        slot_norm: 'l2' as in the paper, or 'rms' (preset 'lucidrains').
        init_scale: Start of the learned scale of 'l2'. At the paper's 1 mixtures start almost even:
            products of unit vectors of D numbers are about D ** -0.5.
    """

    PRESETS: ClassVar[Named] = {
        'paper': {},
        'matched': {'slots_per_token': 2.0},
        'lucidrains': {'slot_norm': 'rms'},
    }

    # no EXACT_UPCYCLING: experts see mixtures of tokens, however equal they are

    slots_per_expert: int | None = option(None, 3, bounds='[1, inf)')
    slots_per_token: float | None = option(None, bounds='(0, 1000]')
    slot_norm: Literal['l2', 'rms'] = option('l2')
    # float16 holds both ends
    init_scale: float = option(
        1.0, 8.0, bounds='[1e-4, 1e4]', of_weights=False, idle={'slot_norm': 'rms'}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio = self.slots_per_token
        allowed = f'None with slots_per_token={ratio}, or set slots_per_token=None'
        self.require('slots_per_expert', None in (self.slots_per_expert, ratio), allowed)


class SoftMoEMlp(MoeLayer):
    """Drop-in for timm's `Mlp`, SoftMoE (1) and (2).

    Args:
        in_features: D.
        config: Options.
        experts: The experts.
        host: Its number of tokens sets P if the options leave it open.
    """

    needs_collecting = False

    def __init__(
        self, in_features: int, config: SoftMoEConfig, experts: Experts, host: Host, **factory: Any
    ) -> None:
        super().__init__()
        self.config, self.num_prefix_tokens = config, host.num_prefix_tokens
        self.slot_norm = config.slot_norm
        slots = float(host.num_tokens)
        if config.slots_per_token is not None:
            slots = config.slots_per_token * (host.num_tokens - host.num_prefix_tokens)
        self.slots_per_expert = config.slots_per_expert or max(round(slots / config.num_experts), 1)
        self.num_slots = config.num_experts * self.slots_per_expert
        self.experts = experts
        self.slot_embed = nn.Parameter(torch.empty(self.num_slots, in_features, **factory))
        self.scale = nn.Parameter(torch.empty((), **factory)) if self.slot_norm == 'l2' else None
        rms = self.slot_norm == 'rms'
        self.token_norm = nn.RMSNorm(in_features, **factory) if rms else None
        self.slot_gain = nn.Parameter(torch.empty(in_features, **factory)) if rms else None
        self.init_weights()

    def init_weights(self) -> None:
        """Slots with the paper's lecun normal (their length does not matter), gains one."""
        nn.init.normal_(self.slot_embed, std=self.slot_embed.shape[1] ** -0.5)
        if self.scale is not None:
            nn.init.constant_(self.scale, self.config.init_scale)
        if self.slot_gain is not None:
            nn.init.ones_(self.slot_gain)

    def mixing_logits(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The one logits tensor behind both softmaxes; (B, N, D) -> (B, N, S)."""
        if self.slot_gain is not None:
            gain = self.slot_gain.float()
            return x.float() @ F.rms_norm(self.slot_embed.float(), gain.shape, gain).t()
        assert self.scale is not None
        slots = self.scale.float() * directions(self.slot_embed.float(), eps=1e-6)
        return directions(x.float(), eps=1e-6).to(dtype) @ slots.t().to(dtype)

    def run_valid(self, x: Tensor, valid: ValidTokens) -> Tensor:
        """As `MoeLayer`: padding is a part of no mixture."""
        return self.run(x, valid).masked_fill(~valid.mask[:, :, None], 0)

    def run(self, x: Tensor, valid: ValidTokens | None = None) -> Tensor:
        """Mix, run, mix back; (B, N, D) -> (B, N, D)."""
        batch, _, width = x.shape
        dtype, given = compute_dtype(x), x
        with full_precision(x):
            if self.token_norm is not None:
                x = F.rms_norm(x.float(), (width,), self.token_norm.weight.float())
            # float64 too is mixed in float32
            logits = self.mixing_logits(x, dtype if dtype.itemsize < 4 else torch.float32)
            logits = self.among_on(logits, self.slots_per_expert)
            if valid is not None:  # finite: what padding is combined of has to be a number too
                lowest = torch.finfo(logits.dtype).min
                logits = logits.masked_fill(~valid.mask[:, :, None], lowest)
            dispatch, combine = (logits.softmax(dim, dtype=torch.float32) for dim in (1, 2))
        slots = dispatch.to(dtype).transpose(1, 2) @ x.to(dtype)  # (B, S, D)
        # by expert: (B, S, D) -> (E, B, P, D) -> (E, B * P, D)
        rows = slots.unflatten(1, (-1, self.slots_per_expert)).transpose(0, 1)
        answers = run_experts_evenly(self.experts, rows.flatten(1, 2)).view(rows.shape)
        answers = answers.transpose(0, 1)
        out = combine.to(dtype) @ answers.reshape(batch, self.num_slots, width)
        self.show({'dispatch': dispatch, 'combine': combine}, given, out)
        return out

    @property
    def experts_per_token(self) -> float:
        """All: every expert answers for every image."""
        return self.experts.num_experts

    def options_in_size(self, num_tokens: int) -> dict:
        """The slots that it has, said as its options say them."""
        if self.config.slots_per_expert is not None:
            return {}
        if self.config.slots_per_token is None:
            return {'slots_per_expert': self.slots_per_expert}
        return {'slots_per_token': self.num_slots / (num_tokens - self.num_prefix_tokens)}

    def fit_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """State of a layer of other slots per expert: thinned, or with copies.

        As many copies of each leave the answer as it is: they share the weight of their original.
        They differ by a hundredth: equal ones would stay equal for ever.
        """
        slots = state.get('slot_embed')
        if slots is None or slots.shape == self.slot_embed.shape:
            return state
        by_expert = slots.unflatten(0, (self.experts.num_experts, -1))
        before, after = by_expert.shape[1], self.slots_per_expert
        chosen = by_expert[:, torch.arange(after) * before // after]
        if after > before:
            spread = 0.01 * chosen.norm(dim=-1, keepdim=True) / math.sqrt(chosen.shape[-1])
            chosen = chosen + spread * torch.randn_like(chosen)
        return {**state, 'slot_embed': chosen.flatten(0, 1)}

    def no_weight_decay(self) -> set[str]:
        """The slots, as in the released code."""
        return {'slot_embed'}
