"""What a contender is, and how to run one step of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .cells import DTYPES, Cell, Settings
from .gpu_card import profiled, work_of
from .gpu_steps import counted_waits
from .inputs import Batch
from .timing import peak_memory

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
    given: Callable[[Batch], Batch] = lambda batch: batch  # beforehand, which is not timed
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


def needs(step: Callable[[], object], settings: Settings) -> dict[str, float]:
    """Peak memory of a step; beside a card its waits, launches and times."""
    found: dict[str, float] = {'peak_mb': peak_memory(step, settings.device) / 1e6}
    if settings.card is not None:
        with counted_waits(settings.device) as waits:
            step()
        found['waits'] = sum(waits.values())
        found['expected_ms'] = settings.card.expected_ms(work_of(step))
        found |= profiled(step, settings.device)
    return found


def autocast(cell: Any, settings: Settings) -> AbstractContextManager:
    """The context in which a `Cell` or a `Comparison` computes."""
    kind = torch.device(settings.device).type
    return torch.autocast(kind, DTYPES[cell.dtype]) if cell.amp else nullcontext()


def place(module: nn.Module, cell: Cell, settings: Settings) -> nn.Module:
    """Move a module to where the cell runs, in its dtype and mode."""
    return module.to(settings.device, cell.param_dtype).train(settings.backward)
