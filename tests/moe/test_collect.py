"""How losses leave a model, and when state changes."""

import copy

import pytest
import torch
from torch import nn

from vqmoe_vision.moe import (
    METHODS,
    MoeLayer,
    collect_losses,
    moe_layers,
    update_state,
)

from .steps import every_case, step, tokens

every_method = pytest.mark.parametrize('method', METHODS)


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


# --- what a block keeps


def test_names_values_and_sum():
    model = nn.Sequential(Reporter(), Reporter())
    with collect_losses(model) as collected:
        model(torch.full((2, 3), 2.0))
        assert {name: loss.item() for name, loss in collected.losses.items()} == {
            '0/loss': 2.0,
            '1/loss': 2.0,
        }
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
    assert collected.summary() == pytest.approx(
        {
            '0/mean': 2.0,
            '0/share_min': 0.0,
            '0/share_max': 0.5,
            '0/share_unused': 1.0,
            '0/share_perplexity': 2.0,
        }
    )


# --- errors


def test_blocks_do_not_nest():
    model = nn.Sequential(Reporter(), Reporter())
    with collect_losses(model) as collected:
        with pytest.raises(RuntimeError, match='do not nest'), collect_losses(model[1]):
            pass
        # and the refused block took nothing away
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


# --- warning


@every_case
def test_a_layer_needs_collecting_if_there_is_something_to_collect(make_model, method, options):
    model = make_model(method, **options)
    _, losses, _ = step(model, tokens())
    for layer in moe_layers(model).values():
        assert layer.needs_collecting == (bool(losses) or layer.moves_state())


# --- copies


# --- state


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
