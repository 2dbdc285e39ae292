"""What ends a training that numbers have left: losses and weights that are nan or infinite."""

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from mmengine.dist import all_gather_object
from torch import nn
from torch.distributed.tensor import DTensor

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
