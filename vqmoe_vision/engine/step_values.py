"""Losses and gradient norms of steps, which stay on the device until somebody looks.

The first look reads all of them at once, and stops at one that is not finite.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import LoggerHook, RuntimeInfoHook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .model import unwrapped
from .seeding import saves_after_iteration

_INFINITE = 'infinite_by_design'  # names of buffers


class NonFiniteError(FloatingPointError):
    """A loss or a parameter is nan or infinite; training cannot go on from here."""


def check_losses(values: Mapping[str, float], iteration: int) -> None:
    """Stops at a total loss that is not finite."""
    if math.isfinite(values.get('loss', 0.0)):
        return
    # MoE layers come before the task's loss and in the order of the network: the first is the
    # nearest to the cause. Finite parts can still overflow in the sum.
    losses = [item for item in values.items() if 'loss' in item[0] and not math.isfinite(item[1])]
    name, value = min(losses, key=lambda item: item[0] == 'loss')  # the first of equals
    told = f'{name.removesuffix("_loss")} became {value} at iteration {iteration}'
    raise NonFiniteError(f'{told}; training has stopped')


def pass_over_infinite(model: nn.Module) -> None:
    """Lets `check_weights` leave out buffers that are infinite by design, such as a mask."""
    found = (name for name, buffer in model.named_buffers() if not buffer.isfinite().all())
    setattr(model, _INFINITE, frozenset(found))


def check_weights(
    model: nn.Module, iteration: int, state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Stops at a parameter or buffer that is not finite."""
    by_design = getattr(model, _INFINITE, ())
    finite = {
        name: torch.isfinite(value.to_local() if isinstance(value, DTensor) else value).all()
        for name, value in (model.state_dict() if state is None else state).items()
        if name not in by_design
    }
    if torch.stack([*finite.values()]).all():  # one wait, and not one for each tensor
        return
    name = next(name for name, sound in finite.items() if not sound)
    kind = 'parameter' if name in dict(model.named_parameters()) else 'buffer'
    raise NonFiniteError(
        f'{kind} {name} became nan or infinite at iteration {iteration}; '
        'training has stopped, and no checkpoint has it'
    )


def check_own_parts(model: nn.Module, iteration: int, state: dict[str, torch.Tensor]) -> None:
    """As `check_weights`: each process looks at its parts, and all of them agree."""
    problem = ''
    try:
        check_weights(model, iteration, state)
    except NonFiniteError as error:
        problem = str(error)
    if found := next(filter(None, all_gather_object(problem)), None):
        raise NonFiniteError(found)


READ_AT_ONCE = {'cpu'}  # kinds of devices whose values cost no wait
LONGEST = 100  # iterations that a loss may wait for a look, however rarely lines are logged
_TRAIN = 'train/'


def read_now(runner: Runner) -> None:
    """Hands mmengine the values of all steps, whether or not that is due."""
    for hook in runner.hooks:
        if isinstance(hook, StepValuesHook):
            hook.after_train_epoch(runner)


class _UnreadNorm:
    """A function that clips gradients, and keeps their norm from whoever would read it."""

    def __init__(self, clip: Callable[..., Tensor | None], keep: Callable[[Tensor], None]) -> None:
        self.clip, self._keep = clip, keep

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if (norm := self.clip(*args, **kwargs)) is not None:
            self._keep(norm)


@HOOKS.register_module()
class StepValuesHook(RuntimeInfoHook):
    """Leaves values of a training step, and the norm of gradients, on the device.

    It reads them where a line of the log or a checkpoint is due, at the end of an epoch, before a
    validation, and after `LONGEST` iterations; on a CPU at each. Batches are put in pinned memory.
    """

    # of steps that nobody has looked at: iteration, name, and a tensor, or a number that cost none
    _unread: tuple[tuple[int, str, Any], ...] = ()

    def before_train(self, runner: Runner) -> None:
        """Takes over what reads values."""
        super().before_train(runner)
        if 'pin_memory' not in runner.cfg.get('train_dataloader', {}):
            runner.train_dataloader.pin_memory = torch.cuda.is_available()
        self._unread = ()
        wrapper = runner.optim_wrapper
        if wrapper.clip_grad_kwargs:
            former = wrapper.clip_func
            clip = former.clip if isinstance(former, _UnreadNorm) else former  # a second training
            wrapper.clip_func = _UnreadNorm(clip, partial(self._add, runner, wrapper.grad_name))

    def _add(self, runner: Runner, name: str, value: Tensor) -> None:
        # detached, or the graph of each step would stay
        kept = value.item() if value.device.type in READ_AT_ONCE else value.detach()
        self._unread = (*self._unread, (runner.iter + 1, name, kept))
        scalars = runner.message_hub.log_scalars
        if _TRAIN + name not in scalars:  # logs have them in the order of coming
            scalars[_TRAIN + name] = HistoryBuffer()
            scalars[_TRAIN + name]._count_history = np.array([], int)  # of floats it would be

    def _read(self, runner: Runner) -> None:
        """Looks at all of them, and hands them to mmengine."""
        unread, self._unread = self._unread, ()
        tensors = [value.reshape(()) for *_, value in unread if isinstance(value, Tensor)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else [])  # with one wait
        for iteration, values in groupby(unread, key=itemgetter(0)):
            found = {n: next(numbers) if isinstance(v, Tensor) else v for _, n, v in values}
            for name, number in found.items():
                runner.message_hub.update_scalar(_TRAIN + name, number)
            check_losses(found, iteration)
            # with a loss scale an infinite gradient is normal: that step is skipped
            if not math.isfinite(found.get('grad_norm', 0.0)):
                check_weights(unwrapped(runner), iteration)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Takes the values of the step, and looks at them where that is due."""
        for name, value in (outputs or {}).items():
            if isinstance(value, Tensor):
                self._add(runner, name, value)
            else:
                runner.message_hub.update_scalar(_TRAIN + name, value)
        # to read is to wait
        if (
            not self._unread
            or not isinstance(self._unread[-1][2], Tensor)
            or runner.iter + 1 - self._unread[0][0] >= LONGEST - 1
            or any(
                saves_after_iteration(hook, runner)
                # it would read them itself, when the clock of the iteration has stopped
                or (
                    isinstance(hook, LoggerHook)
                    and self.every_n_inner_iters(batch_idx, hook.interval)
                )
                for hook in runner.hooks
            )
        ):
            self._read(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """Looks at what is left, before other hooks trust the weights."""
        self._read(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Looks before a save that a signal asks for."""
        self._read(runner)
        checkpoint['message_hub'] = runner.message_hub.state_dict()

    def before_val(self, runner: Runner) -> None:
        """Looks before a validation of the weights, which may be one in the middle of an epoch."""
        self._read(runner)
        super().before_val(runner)
