"""Options of VQMoE; numbers of equations are those of `vqmoe.py`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ..config import BalancedConfig, MoeConfig, check_weights
from ._codebook_config import CodebookConfig
from ._quantizer import EXPERT_INPUTS, FIXED_SHARES

FORMS = ('full', 'discrete', 'continuous')
_ROUTER = ('balance_weight', 'routed_scaling_factor', 'train_router')


@dataclass(frozen=True, kw_only=True)
class VQMoEConfig(BalancedConfig, CodebookConfig):
    """Options of VQMoE, beside those of its codebook; docs/methods.md has what was measured.

    Args:
        form: 'full' (4), 'discrete' (5), or 'continuous', the router branch alone for diagnosis.
        num_codes: M, a multiple of `num_experts`; None gives one code per expert.
        vq_weight: alpha of (6), at least 0.
        expert_input: What the discrete branch feeds its expert: 'mix', 'ste', 'official', 'token'.
        code_share: c of 'mix' and 'official', from 0 to 1.
        rotation_trick: Gradients through the code by rotation in place of straight through.
        input_norm: LayerNorm between code and expert.
        output_norm: LayerNorm after the expert of the discrete branch.
        balance_weight: Weight of the router's balance loss, at least 0.
        diversity_weight: Weight of a loss that evens the use of codes (wav2vec 2.0), at least 0.
        train_router: False freezes the router at its random start with weight one.
        routed_scaling_factor: Of the router's weight, not of losses; above 0 and at most 1e6.

    Presets: 'paper', equations (1) to (6) with nothing added; 'matched', the defaults;
    'official', the released code.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        'paper': {
            'form': 'full',  # (4)
            'num_codes': None,
            # (2)
            'train_router': True,
            'routed_scaling_factor': 1.0,
            # (3)
            'use_cosine_sim': False,
            'expert_input': 'ste',
            'rotation_trick': False,
            'input_norm': False,
            'output_norm': False,
            # (6), whose weights are those of the released code, as the text does not give them
            'codebook': 'plain',
            'train_codebook': True,
            'vq_weight': 0.08,
            'commitment': 0.25,
            'balance_weight': 0.0,
            'diversity_weight': 0.0,
        },
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
        'extras': {
            'ema_bias_correction': True,
            'usage_from_kmeans': True,
            'routed_scaling_factor': 2.75,
            'diversity_weight': 0.1,
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
        {
            'form',
            'num_codes',
            'vq_weight',
            'rotation_trick',
            'balance_weight',
            'diversity_weight',
        }
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
    diversity_weight: float = 0.0
    train_router: bool = True
    routed_scaling_factor: float = 1.0

    @property
    def learns_routing(self) -> bool:
        """By codes, too, which are learned whatever becomes of the router."""
        return self.form != 'continuous' or self.train_router

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require('form', self.form in FORMS, f'one of {FORMS}')
        inputs = self.expert_input
        self.require('expert_input', inputs in EXPERT_INPUTS, f'one of {EXPERT_INPUTS}')
        self.require('code_share', 0 <= self.code_share <= 1, 'between 0 and 1')
        check_weights(self, 'vq_weight', 'balance_weight', 'diversity_weight')
        codes = self.num_codes
        valid = codes is None or (codes >= self.num_experts and codes % self.num_experts == 0)
        multiple = f'a positive multiple of num_experts={self.num_experts}'
        self.require('num_codes', valid, f'{multiple}, or None for one per expert')
        factor = self.routed_scaling_factor
        self.require('routed_scaling_factor', 0 < factor <= 1e6, 'above 0 and at most 1e6')
        valid = self.train_router or self.balance_weight == 0
        self.require('balance_weight', valid, '0 with train_router=False')

    def unused(self) -> dict[str, str]:
        """What belongs to a branch that the form leaves out, or to a loss of weight zero."""
        unused = super().unused()
        if self.vq_weight == 0:
            unused['commitment'] = 'vq_weight=0'
        elif self.commitment == 0 and (rest := self.without_codebook_loss()):
            unused['vq_weight'] = f'commitment=0 and {rest}'
        if self.expert_input in FIXED_SHARES:
            unused['code_share'] = f'expert_input={self.expert_input!r}'
        if FIXED_SHARES.get(self.expert_input, self.code_share) == 0:
            unused['rotation_trick'] = 'experts that are fed the token alone'
        if not self.train_router:
            unused['routed_scaling_factor'] = 'train_router=False'
        if self.form == 'discrete':
            unused |= dict.fromkeys(_ROUTER, "form='discrete'")
        if self.form == 'continuous':
            own = {field.name for field in fields(VQMoEConfig)}
            shared = {field.name for field in fields(MoeConfig)}
            kept = {'form', 'global_balance', *_ROUTER}
            unused |= dict.fromkeys(sorted(own - shared - kept), "form='continuous'")
        names = [n for n in ('balance_weight', 'diversity_weight') if n not in unused]
        if all(getattr(self, name) == 0 for name in names):
            unused['global_balance'] = ', '.join(f'{name}=0' for name in names)
        return unused
