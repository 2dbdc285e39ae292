import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel

from vqmoe_vision.engine import MoeTrainingMixin, NonFiniteError


class Plain(MoeTrainingMixin, BaseModel):
    def forward(self) -> None: ...


@pytest.fixture(autouse=True)
def _iteration() -> None:
    MessageHub.get_current_instance().update_info('iter', 119)


def test_parse_losses_sums_auxiliary_losses_and_not_statistics() -> None:
    entries = {'a/balance_loss': 0.5, 'cross_entropy_loss': 2.0, 'a/load_max': 7.0}
    total, log_vars = Plain().parse_losses({k: torch.tensor(v) for k, v in entries.items()})
    assert total.item() == 2.5
    assert log_vars['a/load_max'].item() == 7


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_loss_that_is_not_finite_names_layer_component_and_iteration(value: float) -> None:
    losses = {
        'blocks.1.mlp/vq_loss': torch.tensor(0.1),
        'blocks.3.mlp/balance_loss': torch.tensor(value),
        'cross_entropy_loss': torch.tensor(value),
    }
    with pytest.raises(NonFiniteError) as caught:
        Plain().parse_losses(losses)
    assert str(caught.value) == (
        f'blocks.3.mlp/balance became {value} at iteration 120 (as did cross_entropy); '
        'training has stopped'
    )


def test_finite_losses_whose_sum_overflows_are_refused() -> None:
    huge = torch.tensor(3e38)
    with pytest.raises(NonFiniteError, match=r'^loss became inf'):
        Plain().parse_losses({'a_loss': huge, 'b_loss': huge})


def test_statistic_that_is_not_finite_does_not_stop_training() -> None:
    total, _ = Plain().parse_losses({'a_loss': torch.tensor(1.0), 'b': torch.tensor(torch.nan)})
    assert total.item() == 1
