import pytest
import torch
from torch import nn

from vqmoe_vision.engine.finite import NonFiniteError, check_losses, check_weights


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_loss_that_is_not_finite_names_layer_component_and_iteration(value: float) -> None:
    losses = {
        'loss': value,
        'blocks.1.mlp/vq_loss': 0.1,
        'blocks.3.mlp/balance_loss': value,
        'cross_entropy_loss': value,
    }
    with pytest.raises(NonFiniteError) as caught:
        check_losses(losses, 120)
    assert str(caught.value) == (
        f'blocks.3.mlp/balance became {value} at iteration 120 (as did cross_entropy); '
        'training has stopped'
    )


def test_finite_losses_whose_sum_overflows_are_refused() -> None:
    with pytest.raises(NonFiniteError, match=r'^loss became inf'):
        check_losses({'loss': float('inf'), 'a_loss': 3e38, 'b_loss': 3e38}, 1)


def test_what_is_only_logged_may_be_anything() -> None:
    check_losses({'loss': 1.0, 'a_loss': 1.0, 'b': float('nan')}, 1)


@pytest.mark.parametrize('kind', ['parameter', 'buffer'])
def test_weights_that_are_not_finite_are_named(kind: str) -> None:
    model = nn.BatchNorm1d(2)
    check_weights(model, 5)
    name = {'parameter': 'weight', 'buffer': 'running_mean'}[kind]
    with torch.no_grad():
        getattr(model, name)[1] = torch.inf
    with pytest.raises(
        NonFiniteError, match=rf'^{kind} {name} became .* at iteration 5; .* no checkpoint has it$'
    ):
        check_weights(model, 5)
