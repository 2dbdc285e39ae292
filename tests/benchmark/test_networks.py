"""Networks are compared with plain loops before they are timed."""

import pytest
import torch

from benchmark.cells import Settings
from benchmark.networks import Comparison, Network, check_against_loops
from benchmark.oracle import WrongResultError
from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe.experts import Experts


def network(method: str, batch: int = 2) -> Network:
    tiny = 'depth=2,embed_dim=24,num_heads=2,num_experts=4'
    comparison = Comparison(models=(), batch=batch, img_size=32)
    return Network(f'vit_tiny_{method},{tiny}', comparison, Settings())


@pytest.mark.parametrize('method', METHODS)
def test_every_method_equals_its_loops(method: str) -> None:
    check_against_loops(network(method))


@pytest.mark.parametrize('method', METHODS)
def test_a_wrong_backend_is_not_timed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Experts.forward

    def wrong(self: Experts, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return right(self, rows, offsets).flip(0)

    monkeypatch.setattr(Experts, 'forward', wrong)
    with pytest.raises(WrongResultError, match='differs from the plain loop; not timed'):
        check_against_loops(network(method))
