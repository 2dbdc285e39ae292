"""What a contender is, and how to run one step of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .cells import Cell, Settings
from .inputs import Batch

# the answer, and a loss if the contender has one
Forward = Callable[[nn.Module, Batch], Sequence[Tensor]]


class UnsuitableError(Exception):
    """A contender cannot run in a cell; the message says why."""


@dataclass
class Contender:
    """One implementation in one cell."""

    name: str
    module: nn.Module
    forward: Forward
    rows: float  # tokens that pass through an expert, once for each
    macs: int  # of a forward pass
    oracle: Forward | None = None  # the same as a plain loop, of ours
    equal_to: str | None = None  # our contender that does a peer's work
    note: str = ''
    drop_rate: float | None = None  # of assignments
    load: float | None = None  # fullest expert over mean load
    _grad: Tensor | None = field(default=None, init=False)

    def step(self, batch: Batch, cell: Cell, settings: Settings) -> None:
        """Forward, and backward if the settings say so; leaves gradients behind."""
        if not settings.backward:
            with torch.no_grad(), autocast(cell, settings):
                self.forward(self.module, batch)
            return
        with autocast(cell, settings):
            outputs = self.forward(self.module, batch)
        answer = outputs[0]
        if self._grad is None:  # in the first, untimed step
            self._grad = torch.randn_like(answer)
        torch.autograd.backward(list(outputs), [self._grad, *[None for _ in outputs[1:]]])

    def clear(self, batch: Batch) -> None:
        """Forget gradients, so that the next step allocates them as training does."""
        batch.clear()
        for parameter in self.module.parameters():
            parameter.grad = None


def autocast(cell: Cell, settings: Settings) -> AbstractContextManager:
    """The context in which a cell computes."""
    if not cell.amp:
        return nullcontext()
    return torch.autocast(torch.device(settings.device).type, dtype=cell.compute_dtype)


def place(module: nn.Module, cell: Cell, settings: Settings) -> nn.Module:
    """Move a module to where the cell runs, in its dtype and mode."""
    return module.to(settings.device, cell.param_dtype).train(settings.backward)
