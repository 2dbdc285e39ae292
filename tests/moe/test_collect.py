"""How losses leave a model, and when state changes."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from vqmoe_vision.moe import MoeLayer, collect_losses, moe_layers, update_state

from .conftest import CASES, D

every_case = pytest.mark.parametrize('method, options', CASES)


def tokens():
    return torch.randn(4, 6, D)


def step(model, x, own=None, **options):
    own = own or model  # without what compiling wraps around it
    own.zero_grad(set_to_none=True)
    with collect_losses(model, **options) as collected:
        loss = model(x).square().mean() + collected.total()
        loss.backward()
    grads = {name: p.grad for name, p in own.named_parameters() if p.requires_grad}
    return loss.detach(), dict(collected.losses), grads


def assert_same_step(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


class Reporter(MoeLayer):
    """Reports its input as loss and statistic, and counts updates in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer('updates', torch.zeros(()))

    def run(self, x):
        loss = self.scale * x.mean()
        stats = {'mean': loss.detach(), 'share': torch.tensor([0.5, 0.5, 0.0])}
        self.record({'loss': loss}, stats, x.shape[0] * x.shape[1])
        return self.scale * x

    def apply_update(self):
        self.updates += 1
        return True


def test_names_values_and_sum():
    model = nn.Sequential(Reporter(), Reporter())
    with collect_losses(model) as collected:
        model(torch.full((2, 3), 2.0))
        found = {name: loss.item() for name, loss in collected.losses.items()}
        assert found == {'0/loss': 2.0, '1/loss': 2.0}
        assert collected.total().item() == 4.0
        assert collected.total().requires_grad


def test_two_forwards_sum_losses_and_average_statistics():
    model = Reporter()
    with collect_losses(model) as collected:
        model(torch.full((2, 3), 2.0))
        model(torch.full((2, 3), 6.0))
        assert collected.total().item() == 8.0
        assert collected.stats['/mean'].item() == 4.0
    model(torch.full((2, 3), 9.0))
    assert collected.losses['/loss'].item() == 8.0 and not collected.losses['/loss'].requires_grad


def test_summary_known_answer():
    model = Reporter()
    with collect_losses(nn.Sequential(model)) as collected:
        model(torch.full((2, 3), 2.0))
    # shares (.5, .5, 0): entropy ln 2
    shares = {'share_min': 0.0, 'share_max': 0.5, 'share_unused': 1.0, 'share_perplexity': 2.0}
    expected = {f'0/{name}': value for name, value in {'mean': 2.0, **shares}.items()}
    assert collected.summary() == pytest.approx(expected)


def test_blocks_do_not_nest():
    model = nn.Sequential(Reporter(), Reporter())
    with collect_losses(model) as collected:
        with pytest.raises(RuntimeError, match='do not nest'), collect_losses(model[1]):
            pass
        model(torch.full((2, 3), 2.0))
        assert collected.total().item() == 4.0
    with collect_losses(model):
        pass


@every_case
def test_an_error_in_a_block_leaves_nothing_for_the_next(make_model, method, options):
    model, x = make_model(method, **options), tokens()
    twin = copy.deepcopy(model)
    with pytest.raises(KeyError), collect_losses(model):
        model(tokens() + 10)
        raise KeyError
    for each in (model, twin):
        torch.manual_seed(1)
        with collect_losses(each):
            each(x)
    expected, actual = twin.state_dict(), model.state_dict()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@every_case
def test_a_layer_needs_collecting_if_there_is_something_to_collect(make_model, method, options):
    model = make_model(method, **options)
    _, losses, _ = step(model, tokens())
    for layer in moe_layers(model).values():
        assert layer.needs_collecting == (bool(losses) or layer.moves_state())


@pytest.mark.parametrize('passes', [1, 3])
def test_state_changes_once_when_the_block_is_left(passes):
    model = Reporter()
    with collect_losses(model):
        for _ in range(passes):
            model(torch.ones(2, 3))
        assert model.updates.item() == 0
    assert model.updates.item() == 1


@every_case
def test_a_layer_says_whether_an_update_moves_its_state(make_model, snapshot, method, options):
    model = make_model(method, **options)
    step(model, tokens(), update_state=False)
    before = snapshot(model)
    update_state(model)
    moved = any(not torch.equal(before[name], v) for name, v in model.state_dict().items())
    assert moved == any(layer.moves_state() for layer in moe_layers(model).values())


@every_case
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_checkpointing_changes_no_loss_gradient_or_state(make_model, method, options, training):
    plain, x = make_model(method, **options).train(training), tokens()
    checkpointed = copy.deepcopy(plain)
    checkpointed.checkpointing = True
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (plain, checkpointed)]
    for i in range(1 + training):  # learned state of one step is used in the next
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
    # nothing behind the layer asks for its repetition before its gradient is there
    if not residual:
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
    says = pytest.raises(RuntimeError, match='use use_reentrant=False') if loses else nullcontext()
    with collect_losses(model), says:
        checkpoint(block, x, use_reentrant=True).sum().backward()


@every_case
@pytest.mark.parametrize('update_state', [True, False], ids=['updated', 'waiting'])
def test_a_later_backward_has_the_gradients_of_the_block(make_model, method, options, update_state):
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


@pytest.mark.long  # methods with their defaults are compiled in models
@every_case
def test_compiled_layer_has_equal_losses_and_gradients(make_layer, method, options):
    plain = make_layer(method, **options)
    twin = copy.deepcopy(plain)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    models = (plain, twin)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in models]
    for i in range(4):
        x, results = tokens(), []
        for model, module, optimizer in zip((plain, compiled), models, optimizers, strict=True):
            torch.manual_seed(i)
            results.append(step(model, x, module))
            optimizer.step()
        assert_same_step(*results)
    assert counter.frame_count == 1
    torch.testing.assert_close(dict(twin.state_dict()), dict(plain.state_dict()))
