"""How losses leave a model, and when state changes."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vqmoe_vision.moe import MoeLayer, collect_losses, moe_layers, update_state
from vqmoe_vision.moe.collect import UNREAD

from .conftest import CASES, D

every_case = pytest.mark.parametrize('method, options', CASES)


def tokens():
    return torch.randn(4, 6, D)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def step(model, x, **options):
    """Losses by name, and gradients."""
    model.zero_grad(set_to_none=True)
    with collect_losses(model, **options) as collected:
        (model(x).square().mean() + collected.total()).backward()
    return dict(collected.losses), gradients(model)


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


def test_two_forwards_sum_losses_and_average_statistics():
    model = nn.Sequential(Reporter())
    with collect_losses(model) as collected:
        model(torch.full((2, 3), 2.0))
        model(torch.full((2, 3), 6.0))
        assert collected.total().item() == 8.0 and collected.total().requires_grad
    model(torch.full((2, 3), 9.0))
    assert collected.losses['0/loss'].item() == 8.0
    assert not collected.losses['0/loss'].requires_grad
    # shares (.5, .5, 0): entropy ln 2
    shares = {'share_min': 0.0, 'share_max': 0.5, 'share_unused': 1.0, 'share_perplexity': 2.0}
    expected = {f'0/{name}': value for name, value in {'mean': 4.0, **shares}.items()}
    assert collected.summary() == pytest.approx(expected)


def test_blocks_do_not_nest():
    model = nn.Sequential(Reporter(), Reporter())
    with collect_losses(model) as collected:
        with pytest.raises(RuntimeError, match='do not nest'), collect_losses(model[1]):
            pass
        model(torch.full((2, 3), 2.0))
        assert collected.total().item() == 4.0


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


@pytest.mark.parametrize('passes', [1, 3])
def test_state_changes_once_when_the_block_is_left(passes):
    model = Reporter()
    with collect_losses(model):
        for _ in range(passes):
            model(torch.ones(2, 3))
        assert model.updates.item() == 0
    assert model.updates.item() == 1


@every_case
def test_a_layer_says_what_there_is_to_collect_and_to_move(make_model, snapshot, method, options):
    model = make_model(method, **options)
    losses, _ = step(model, tokens(), update_state=False)
    before = snapshot(model)
    update_state(model)
    moved = any(not torch.equal(before[name], v) for name, v in model.state_dict().items())
    for layer in moe_layers(model).values():
        assert layer.moves_state() == moved
        assert layer.needs_collecting == (bool(losses) or moved)


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
def test_blocks_may_wait_for_one_backward_after_an_update(make_model, method, options):
    model, batches = make_model(method, **options), [tokens(), tokens()]
    total, expected = 0.0, {}
    for number, x in enumerate(batches):
        torch.manual_seed(number)
        _, grads = step(model, x, update_state=False)
        expected = {name: expected.get(name, 0.0) + grad for name, grad in grads.items()}
    model.zero_grad()
    for number, x in enumerate(batches):
        torch.manual_seed(number)
        with collect_losses(model, update_state=number == 1) as collected:
            total = total + model(x).square().mean() + collected.total()
    total.backward()
    torch.testing.assert_close(gradients(model), expected)


def train_without_reading(model, read=lambda collected: None, mode=True):
    model.train(mode)
    with collect_losses(model) as collected:
        model(tokens()).mean().backward()
    read(collected)
    with collect_losses(model):
        pass


@pytest.mark.parametrize(
    'read, mode, warns',
    [
        (lambda collected: None, True, True),
        (lambda collected: collected.losses, True, False),  # as a log does, after the block
        (lambda collected: None, False, False),  # an evaluation has no losses
    ],
)
def test_losses_that_nobody_read_are_said_when_the_next_block_opens(
    monkeypatch, recwarn, make_model, read, mode, warns
):
    monkeypatch.setattr('vqmoe_vision.moe.layer._said', set())
    model = make_model('smoe')
    train_without_reading(model, read, mode)
    messages = [str(warning.message) for warning in recwarn]
    assert [message == UNREAD for message in messages] == [True] * warns
    train_without_reading(model, read, mode)  # once
    assert len(recwarn) == warns


def test_a_step_that_failed_or_read_its_losses_is_not_warned_of(monkeypatch, recwarn, make_model):
    monkeypatch.setattr('vqmoe_vision.moe.layer._said', set())
    model = make_model('smoe')
    with pytest.raises(KeyError), collect_losses(model):
        model(tokens())
        raise KeyError
    step(model, tokens())
    with collect_losses(model), torch.no_grad():  # statistics alone
        model(tokens())
    step(model, tokens())
    assert not recwarn
