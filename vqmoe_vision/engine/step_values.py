"""Losses and gradient norms of steps, which stay on the device until somebody looks.

The first look reads all of them at once, and stops at one that is not finite.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import LoggerHook, RuntimeInfoHook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import OptimWrapperDict
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
    bad = {
        name.removesuffix('_loss'): value
        for name, value in values.items()
        if name != 'loss' and 'loss' in name and not math.isfinite(value)
    }
    # MoE layers come before the task's loss and in the order of the network: the first is the
    # nearest to the cause. Finite parts can still overflow in the sum.
    name, value = next(iter(bad.items())) if bad else ('loss', values['loss'])
    others = f' (as did {", ".join(list(bad)[1:])})' if len(bad) > 1 else ''
    raise NonFiniteError(
        f'{name} became {value} at iteration {iteration}{others}; training has stopped'
    )


def pass_over_infinite(model: nn.Module) -> None:
    """Lets `check_weights` leave out buffers that are infinite by design, such as a mask."""
    found = (name for name, buffer in model.named_buffers() if not buffer.isfinite().all())
    setattr(model, _INFINITE, frozenset(found))


def check_weights(
    model: nn.Module, iteration: int, state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Stops at a parameter or buffer that is not finite."""
    by_design: frozenset[str] = getattr(model, _INFINITE, frozenset())
    finite: dict[str, torch.Tensor] = {}
    of_devices = defaultdict(list)
    for name, value in (model.state_dict() if state is None else state).items():
        if name in by_design:
            continue
        own = value.to_local() if isinstance(value, DTensor) else value
        finite[name] = torch.isfinite(own).all()
        of_devices[own.device].append(finite[name])
    # one wait for each device and not one for each tensor
    if all(torch.stack(answers).all() for answers in of_devices.values()):
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
    found = next(filter(None, all_gather_object(problem)), None)
    if found is not None:
        raise NonFiniteError(found)


READ_AT_ONCE = {'cpu'}  # kinds of devices whose values cost no wait
LONGEST = 100  # iterations that a loss may wait for a look, however rarely lines are logged
_TRAIN = 'train/'


class StepValues:
    """The values of training steps that nobody has looked at yet."""

    def __init__(self, hub: MessageHub, check: Callable[[int, dict[str, float]], None]) -> None:
        self._hub, self._check = hub, check
        # iteration, name, and a tensor, or a number where that costs nothing
        self._unread: list[tuple[int, str, Any]] = []

    def add(self, iteration: int, name: str, value: Tensor) -> None:
        """Takes a value."""
        at_once = value.device.type in READ_AT_ONCE
        kept = value.item() if at_once else value.detach()  # or the graph of each step would stay
        self._unread.append((iteration, name, kept))
        if _TRAIN + name not in self._hub.log_scalars:  # logs have them in the order of coming
            buffer = self._hub.log_scalars[_TRAIN + name] = HistoryBuffer()
            buffer._count_history = np.array([], int)  # of floats it would be

    def waits_since(self) -> int | None:
        """The first iteration that nobody has looked at; None without one."""
        return self._unread[0][0] if self._unread else None

    def on_device(self) -> bool:
        """Whether to read the newest value would be to wait."""
        return bool(self._unread) and isinstance(self._unread[-1][2], Tensor)

    def read(self) -> None:
        """Looks at all of them, and hands them to mmengine."""
        unread, self._unread = self._unread, []
        tensors = [value for *_, value in unread if isinstance(value, Tensor)]
        numbers = dict(zip(map(id, tensors), _numbers(tensors), strict=True))
        for iteration, values in groupby(unread, key=itemgetter(0)):
            found = {name: numbers.get(id(value), value) for _, name, value in values}
            for name, number in found.items():
                self._hub.update_scalar(_TRAIN + name, number)
            self._check(iteration, found)


def read_now(runner: Runner) -> None:
    """Hands mmengine the values of all steps, whether or not that is due."""
    for hook in runner.hooks:
        if isinstance(hook, StepValuesHook):
            hook.after_train_epoch(runner)


def _numbers(tensors: list[Tensor]) -> list[float]:
    """Reads tensors of one element, with one wait for those of one dtype on one device."""
    kinds: dict[tuple, list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
    numbers = [0.0] * len(tensors)
    for indices in kinds.values():
        together = torch.cat([tensors[index].reshape(1) for index in indices])
        for index, number in zip(indices, together.tolist(), strict=True):
            numbers[index] = number
    return numbers


class _UnreadNorm:
    """A function that clips gradients, and keeps their norm from whoever would read it."""

    def __init__(self, clip: Callable[..., Tensor | None], keep: Callable[[Tensor], None]) -> None:
        self.clip, self._keep = clip, keep

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        norm = self.clip(*args, **kwargs)
        if norm is not None:
            self._keep(norm)


@HOOKS.register_module()
class StepValuesHook(RuntimeInfoHook):
    """Leaves values of a training step, and the norm of gradients, on the device.

    It reads them where a line of the log or a checkpoint is due, at the end of an epoch, before a
    validation, and after `LONGEST` iterations; on a CPU at each. Batches are put in pinned memory.
    """

    def before_train(self, runner: Runner) -> None:
        """Takes over what reads values."""
        super().before_train(runner)
        if 'pin_memory' not in runner.cfg.get('train_dataloader', {}):
            runner.train_dataloader.pin_memory = torch.cuda.is_available()

        def check(iteration: int, values: dict[str, float]) -> None:
            check_losses(values, iteration)
            # with a loss scale an infinite gradient is normal: that step is skipped
            if not math.isfinite(values.get('grad_norm', 0.0)):
                check_weights(unwrapped(runner), iteration)

        self._values = StepValues(runner.message_hub, check)
        wrapper = runner.optim_wrapper
        several = isinstance(wrapper, OptimWrapperDict)
        for one in wrapper.optim_wrappers.values() if several else [wrapper]:
            if one.clip_grad_kwargs:
                self._keep_norm(runner, one)

    def _keep_norm(self, runner: Runner, wrapper: Any) -> None:
        former = wrapper.clip_func
        clip = former.clip if isinstance(former, _UnreadNorm) else former  # a second training
        name = wrapper.grad_name
        wrapper.clip_func = _UnreadNorm(
            clip, lambda norm: self._values.add(runner.iter + 1, name, norm)
        )

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Takes the values of the step, and looks at them where that is due."""
        for name, value in (outputs or {}).items():
            if isinstance(value, Tensor):
                self._values.add(runner.iter + 1, name, value)
            else:
                runner.message_hub.update_scalar(_TRAIN + name, value)
        if not self._values.on_device() or self._is_due(runner, batch_idx):
            self._values.read()

    def after_train_epoch(self, runner: Runner) -> None:
        """Looks at what is left, before other hooks trust the weights."""
        self._values.read()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Looks before a save that a signal asks for."""
        self._values.read()
        checkpoint['message_hub'] = runner.message_hub.state_dict()

    def before_val(self, runner: Runner) -> None:
        """Looks before a validation of the weights, which may be one in the middle of an epoch."""
        if hasattr(self, '_values'):
            self._values.read()
        super().before_val(runner)

    def _is_due(self, runner: Runner, batch_idx: int) -> bool:
        since = self._values.waits_since()
        return (since is not None and runner.iter + 1 - since >= LONGEST - 1) or any(
            saves_after_iteration(hook, runner)
            # the logger would read them itself, when the clock of the iteration has stopped
            or (isinstance(hook, LoggerHook) and self.every_n_inner_iters(batch_idx, hook.interval))
            for hook in runner.hooks
        )
