"""Gradients of a backward pass that runs after its block was left, when state has changed."""

import pytest
import torch

from vqmoe_vision.moe import collect_losses

from .steps import assert_same_step, every_case, step, tokens


@every_case
@pytest.mark.parametrize('update_state', [True, False], ids=['updated', 'waiting'])
def test_a_later_backward_has_the_gradients_of_one_in_the_block(
    make_model, method, options, update_state
):
    model, x = make_model(method, **options), tokens()
    with collect_losses(model):
        model(x)  # codes that start by the tokens have started
    torch.manual_seed(1)
    _, _, expected = step(model, x, update_state=False)
    model.zero_grad()
    torch.manual_seed(1)
    with collect_losses(model, update_state=update_state) as collected:
        loss = model(x).square().mean() + collected.total()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same_step([grads], [expected])


@every_case
def test_blocks_may_wait_for_one_backward(make_model, method, options):
    model, batches = make_model(method, **options), [tokens(), tokens()]
    total, expected = 0.0, {}
    for number, x in enumerate(batches):
        torch.manual_seed(number)
        _, _, grads = step(model, x, update_state=False)
        expected = {name: expected.get(name, 0.0) + grad for name, grad in grads.items()}
    model.zero_grad()
    for number, x in enumerate(batches):
        torch.manual_seed(number)
        with collect_losses(model, update_state=False) as collected:
            total = total + model(x).square().mean() + collected.total()
    total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same_step([grads], [expected])
