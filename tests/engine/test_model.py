import torch
from mmengine.model import BaseModel

from vqmoe_vision.engine import MoeTrainingMixin


class Plain(MoeTrainingMixin, BaseModel):
    def forward(self) -> None: ...


def test_parse_losses_sums_auxiliary_losses_and_not_statistics() -> None:
    entries = {'a/balance_loss': 0.5, 'cross_entropy_loss': 2.0, 'a/load_max': 7.0}
    total, log_vars = Plain().parse_losses({k: torch.tensor(v) for k, v in entries.items()})
    assert total.item() == 2.5
    assert log_vars['a/load_max'].item() == 7
