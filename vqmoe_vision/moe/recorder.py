"""What layers report, and who looks at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .codebook import Quantized
from .joint_losses import Loss
from .routing import Routing

# What a pass decided for every token, by name; a module that decided has the name it has in the
# layer. Then come the tokens (B, N, D) that the layer was given, and its answer.
Decisions = dict[str, Routing | Quantized | Tensor]
Watcher = Callable[[Decisions, Tensor, Tensor], None]


class Recorder:
    """Keeps what a layer reports while a `collect_losses` block is open."""

    def __init__(self) -> None:
        self.active = False
        self.losses: list[tuple[str, Loss, int]] = []  # the last is the number of tokens
        self.stats: list[tuple[str, Tensor]] = []
        self.watcher: Watcher | None = None  # of what is decided for every token

    def __getstate__(self) -> dict[str, Any]:
        # copies and pickles of a model start closed, empty and unwatched
        return {'active': False, 'losses': [], 'stats': [], 'watcher': None}

    def start(self) -> None:
        """Begin to keep."""
        self.active = True

    def stop(self) -> None:
        """Stop keeping, and forget."""
        self.active, self.losses, self.stats = False, [], []
