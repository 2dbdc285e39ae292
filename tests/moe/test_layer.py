"""What must hold for the layer of every method and preset; a new method is tested by its entry."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from vqmoe_vision.moe import METHODS, collect_losses
from vqmoe_vision.moe.losses import BalanceLoss

from .conftest import CASES

D = 8
# but those of which an image by design depends on the others
every_case = pytest.mark.parametrize(
    'method, options', [case for case in CASES if not case.values[1].get('eval_capacity_factor')]
)


def tokens(batch=4, num_tokens=6):
    return torch.randn(batch, num_tokens, D)


@every_case
def test_neither_forward_nor_eval_mode_changes_state(make_layer, snapshot, method, options):
    layer = make_layer(method, **options)
    before = snapshot(layer)
    layer(tokens())
    with collect_losses(layer.eval()) as collected:
        layer(tokens())
    after = layer.state_dict()
    assert collected.losses == {}
    assert all(torch.equal(before[name], after[name]) for name in before)


@every_case
@pytest.mark.parametrize('joint', [True, False], ids=['joint', 'own'])
def test_losses_balance_the_tokens_that_the_options_say(make_layer, method, options, joint):
    config, options = METHODS[method].config, {**options, 'global_balance': joint}
    if (
        'global_balance' not in config.option_names()
        or 'global_balance' in config.of_preset(**options).unused()
    ):
        pytest.skip('nothing is balanced')
    layer = make_layer(method, **options)
    with collect_losses(layer):
        layer(tokens())
        found = [loss for _, loss, _ in layer.layer.recorder.losses]
    assert any(isinstance(loss, BalanceLoss) for loss in found) == joint


@every_case
def test_a_permutation_of_tokens_permutes_the_answer_of_methods_that_say_so(
    make_layer, method, options
):
    model, x = make_layer(method, **options).eval(), tokens()
    model.read(x)  # once: raw patches stay where they are
    layer, shuffle = model.layer, torch.randperm(6)
    permuted, expected = layer(x[:, shuffle]), layer(x)[:, shuffle]
    if layer.permutation_equivariant:
        torch.testing.assert_close(permuted, expected)
    elif not METHODS[method].needs_features:  # whose places count in training
        # or a model of it would be refused dropped patches for nothing
        assert not torch.allclose(permuted, expected)


@every_case
def test_routing_changes_while_the_model_learns(make_model, choices, method, options):
    if not METHODS[method].config.from_options(**options).learns_routing:
        pytest.skip('the method says that it does not')
    model, x = make_model(method, **options), tokens(32, 8)
    before = choices(model.eval(), x)
    if not before:
        pytest.skip('nothing is chosen')
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for _ in range(5):
        with collect_losses(model) as collected:
            (model(x).square().mean() + collected.total()).backward()
        optimizer.step()
    after = choices(model.eval(), x)
    changed = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
    assert any(changed), 'every token goes where it went before training'


@every_case
def test_autocast_gives_the_same_experts_and_losses(make_layer, choices, method, options):
    layer = make_layer(method, num_experts=16, **options)
    # 4000 tokens: with logits in bfloat16 about 0.4 % of them would go elsewhere
    x = tokens(4, 1000)
    for training in (True, False):
        found = []
        for enabled in (False, True):
            torch.manual_seed(1)  # router noise
            with (
                torch.autocast('cpu', torch.bfloat16, enabled=enabled),
                collect_losses(layer.train(training), update_state=False) as collected,
            ):
                found.append((choices(layer, x), dict(collected.losses)))
        assert bool(found[0][0]) == hasattr(layer.layer, 'router')
        torch.testing.assert_close(*found, rtol=0, atol=0)


@every_case
@settings(max_examples=5)
@given(
    batch=st.integers(1, 4),
    num_tokens=st.integers(1, 7),
    num_experts=st.sampled_from([2, 3, 4, 8]),
    seed=st.integers(0, 2**31),
)
def test_any_size_is_finite_forward_and_backward(
    make_layer, method, options, batch, num_tokens, num_experts, seed
):
    torch.manual_seed(seed)
    options = {'num_experts': num_experts, **options}
    unused = METHODS[method].config.of_preset(**options).unused()  # with so few experts
    options = {name: value for name, value in options.items() if name not in unused}
    layer = make_layer(method, **options)
    x = tokens(batch, num_tokens).requires_grad_()
    with collect_losses(layer) as collected:
        out = layer(x)
        (out.sum() + collected.total()).backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
