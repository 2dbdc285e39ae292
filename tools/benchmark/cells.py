"""What is measured: the shape of one MoE layer and how its tokens are spread.

Legend: B images, N tokens per image, T = B * N, D width, H hidden width of an expert, E experts,
K experts per token.
"""

from dataclasses import dataclass

import torch

from vqmoe_vision.moe.config import check

from .gpu_card import Card

DTYPES = {
    'float32': torch.float32,
    'bfloat16': torch.bfloat16,
    'float16': torch.float16,
    'float64': torch.float64,
}
MLP_RATIO = 4  # hidden width over width, timm's ViT


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration in which all contenders run."""

    tokens: int = 197
    batch: int = 8
    width: int = 384
    experts: int = 8
    top_k: int = 1
    dtype: str = 'float32'  # of parameters and tokens, or of autocast
    amp: bool = False
    skew: float = 1.0  # load of the fullest expert over the mean load

    def __post_init__(self) -> None:
        for name in ('tokens', 'batch', 'width', 'experts', 'top_k'):
            check(getattr(self, name) >= 1, name, getattr(self, name), 'at least 1')
        check(self.dtype in DTYPES, 'dtype', self.dtype, f'one of {sorted(DTYPES)}')
        check(self.top_k <= self.experts, 'top_k', self.top_k, f'at most experts={self.experts}')
        most = self.experts / self.top_k  # the fullest expert takes every token once
        check(1 <= self.skew <= most, 'skew', self.skew, f'from 1 to experts / top_k = {most:g}')
        low = self.dtype in ('bfloat16', 'float16')
        check(low or not self.amp, 'amp', self.amp, 'autocast needs bfloat16 or float16')

    @property
    def hidden(self) -> int:
        return MLP_RATIO * self.width

    @property
    def num_tokens(self) -> int:
        return self.batch * self.tokens

    @property
    def num_rows(self) -> int:
        return self.num_tokens * self.top_k

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        return DTYPES[self.dtype]

    @property
    def param_dtype(self) -> torch.dtype:
        """What parameters and tokens are stored in."""
        return torch.float32 if self.amp else self.compute_dtype

    def __str__(self) -> str:
        amp = ' amp' if self.amp else ''
        return (
            f'{self.batch} x {self.tokens} tokens, width {self.width}, {self.experts} experts, '
            f'top-{self.top_k}, {self.dtype}{amp}, skew {self.skew:g}'
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    device: str = 'cpu'
    threads: int = 1
    clock: str = 'wall'  # or 'process', the CPU time of all threads
    repeats: int = 15
    backward: bool = True
    compiled: bool = False
    card: Card | None = None  # whose rates tell how long a step should take

    def __post_init__(self) -> None:
        check(self.repeats >= 1, 'repeats', self.repeats, 'at least 1')
        check(self.threads >= 1, 'threads', self.threads, 'at least 1')
        if self.device.startswith('cuda'):  # which works while the process waits
            check(self.clock == 'wall', 'clock', self.clock, "'wall' on a GPU")
            usable = "'cpu', as this machine has no usable CUDA device"
            check(torch.cuda.is_available(), 'device', self.device, usable)
