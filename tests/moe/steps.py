"""Training steps of models and layers with experts."""

import pytest
import torch

from vqmoe_vision.moe import collect_losses

from .conftest import CASES

D = 8
every_case = pytest.mark.parametrize(('method', 'options'), CASES)


def tokens():
    return torch.randn(4, 6, D)


def step(model, x, **options):
    """Losses and gradients of one training step, without an optimizer."""
    model.zero_grad(set_to_none=True)
    with collect_losses(model, **options) as collected:
        loss = model(x).square().mean() + collected.total()
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), dict(collected.losses), grads


def assert_same_step(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
