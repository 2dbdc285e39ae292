"""Losses and state of a step whose forward pass is repeated or compiled."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from vqmoe_vision.moe import collect_losses

from .steps import assert_same_step, every_case, step, tokens

# --- checkpointing


@every_case
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_checkpointing_changes_neither_losses_nor_gradients_nor_state(
    make_model, method, options, training
):
    plain, x = make_model(method, **options).train(training), tokens()
    checkpointed = copy.deepcopy(plain)
    checkpointed.checkpointing = True
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (plain, checkpointed)]
    for i in range(3):  # learned state of one step is used in the next
        results = []
        for model, optimizer in zip((plain, checkpointed), optimizers, strict=True):
            torch.manual_seed(i)
            results.append(step(model, x + i))
            optimizer.step()
        assert_same_step(*results)
    torch.testing.assert_close(dict(checkpointed.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize('residual', [True, False], ids=['followed by LayerScale', 'last'])
@pytest.mark.parametrize('both', [True, False], ids=['both', 'the first'])
def test_a_later_pass_does_not_hide_that_the_state_changed(make_model, residual, both):
    model = make_model('vqmoe', codebook='ema')
    if (
        not residual
    ):  # nothing behind the layer asks for its repetition before its gradient is there
        model.blocks = nn.ModuleList(block.mlp for block in model.blocks)
    model.checkpointing = True
    with collect_losses(model):  # and no loss of the layers, whose gradients would tell as well
        loss = model(tokens()).square().mean()
    match = r'call backward\(\) inside the collect_losses block'
    with collect_losses(model):
        later = model(tokens()).square().mean()
        loss = loss + later if both else loss
        with pytest.raises(RuntimeError, match=match):
            loss.backward()


@every_case
def test_a_reentrant_repetition_is_refused_where_it_would_lose_losses(make_model, method, options):
    model = make_model(method, **options)
    block, x = model.blocks[0], tokens().requires_grad_()
    loses = block.mlp.needs_collecting
    model.read(x)
    with collect_losses(model), refusal(loses, 'use use_reentrant=False'):
        checkpoint(block, x, use_reentrant=True).sum().backward()


def refusal(expected, match):
    return pytest.raises(RuntimeError, match=match) if expected else nullcontext()


# --- a backward pass that runs after its block was left


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


# --- compile


@pytest.mark.long  # methods with their defaults are compiled in models
@every_case
def test_compiled_layer_has_equal_losses_and_gradients_and_compiles_once(
    make_layer, method, options
):
    plain = make_layer(method, **options)
    twin = copy.deepcopy(plain)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (plain, twin)]
    for i in range(4):
        x, results = tokens(), []
        for model, module, optimizer in zip(
            (plain, compiled), (plain, twin), optimizers, strict=True
        ):
            torch.manual_seed(i)
            module.zero_grad(set_to_none=True)
            with collect_losses(model) as collected:
                loss = model(x).square().mean() + collected.total()
                loss.backward()
            grads = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
            results.append((loss.detach(), dict(collected.losses), grads))
            optimizer.step()
        assert_same_step(*results)
    assert counter.frame_count == 1
    torch.testing.assert_close(dict(twin.state_dict()), dict(plain.state_dict()))
