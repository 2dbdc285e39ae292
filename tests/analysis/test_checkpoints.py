import copy

import pytest
import torch

from vqmoe_vision.analysis.checkpoints import convergence, routing_changes
from vqmoe_vision.moe import moe_layers

NAME = 'blocks.1.mlp'


def test_changes_between_checkpoints_are_counted_over_all_images(make_tiny) -> None:
    before = make_tiny('smoe')
    after = copy.deepcopy(before)
    images = torch.rand(3, 3, 32, 32)
    assert routing_changes(before, after, images.split(2)) == {f'{NAME}.router': 0}
    with torch.no_grad():
        router = moe_layers(after)[NAME].router
        router.weight.copy_(router.weight.roll(1, dims=0))  # every expert has another number
    assert routing_changes(before, after, images.split(2)) == {f'{NAME}.router': 1}


def test_a_part_that_arrives_first_has_converged_first(make_tiny) -> None:
    # the router has its last weights at the second checkpoint of three, the experts are half way
    start = make_tiny('vqmoe', num_experts=2).state_dict()
    moved = {n: torch.randn_like(v) for n, v in start.items() if v.is_floating_point()}
    end = {n: v + moved.get(n, 0) for n, v in start.items()}
    middle = {n: v + moved.get(n, 0) * (1 if '.router.' in n else 0.5) for n, v in start.items()}
    found = convergence([start, middle, end], [NAME])
    assert found.keys() == {f'{NAME}.{part}' for part in ('router', 'quantizer', 'gate', 'experts')}
    assert found[f'{NAME}.router']['distance'] == pytest.approx([1, 0, 0], abs=1e-6)
    assert found[f'{NAME}.experts']['distance'] == pytest.approx([1, 0.5, 0], abs=1e-6)
    first, second, third = found[f'{NAME}.experts']['similarity']
    assert first < second < third == pytest.approx(1)
