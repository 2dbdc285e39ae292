"""Nothing of ours is timed before it equals the plain loop, in outputs and every gradient."""

import copy

import torch
from torch import Tensor, nn

from .cells import Cell, Settings
from .contenders import Contender, Forward, autocast
from .inputs import Batch


class WrongResultError(RuntimeError):
    """A contender differs from its oracle, so its time means nothing."""


def check_against_oracle(
    contender: Contender, batch: Batch, cell: Cell, settings: Settings
) -> None:
    """Compare a contender with its oracle in the very configuration that is to be timed."""
    assert contender.oracle is not None
    module = contender.module
    with autocast(cell, settings):
        found = results(module, contender.forward, batch, settings)
        plain = results(module, contender.oracle, batch, settings)
    exact = results(copy.deepcopy(module).double(), contender.oracle, batch.double(), settings)
    # Four times the oracle's own distance in this precision: sums in another order round otherwise.
    # Where that happens to be 0, some units of the last place; routers are float32 in any dtype.
    rounding = max(8 * torch.finfo(cell.compute_dtype).eps, 64 * torch.finfo(torch.float32).eps)
    if found.keys() != exact.keys():
        differing = sorted(exact.keys() ^ found.keys())
        raise WrongResultError(f'{contender.name} in {cell}: only one side has {differing}')
    for name, truth in exact.items():
        scale = truth.abs().max().item() if truth.numel() else 0.0
        allowed = 4 * _distance(plain[name], truth) + rounding * scale
        if truth.ndim == 0:  # a loss, whose variance of nearly equal numbers cancels most digits
            allowed += 1e-9
        error = _distance(found[name], truth)
        if not error <= allowed:  # nan too
            raise WrongResultError(
                f'{contender.name} in {cell}: {name} is {error:.2g} from the plain loop, '
                f'{allowed:.2g} would be rounding; not timed'
            )


def _distance(value: Tensor, truth: Tensor) -> float:
    return (value - truth).abs().max().item() if truth.numel() else 0.0


def results(
    module: nn.Module, forward: Forward, batch: Batch, settings: Settings
) -> dict[str, Tensor]:
    """Outputs and gradients by name, in float64."""
    learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
    leaves = {'x': batch.x, 'weights': batch.weights, **learned}
    devices = [batch.x.device] if batch.x.is_cuda else []
    with torch.random.fork_rng(devices), torch.set_grad_enabled(settings.backward):
        torch.manual_seed(0)  # the same router noise, and the same gradient
        outputs = forward(module, batch)
        torch.manual_seed(1)
        grad = torch.randn(outputs[0].shape).to(outputs[0])
    found = {f'output {i}': output.detach().double() for i, output in enumerate(outputs)}
    if settings.backward:
        grads = torch.autograd.grad(
            list(outputs),
            list(leaves.values()),
            [grad, *[None for _ in outputs[1:]]],
            allow_unused=True,
        )
        for name, gradient in zip(leaves, grads, strict=True):
            if gradient is not None:
                found[f'gradient of {name}'] = gradient.double()
    return found
