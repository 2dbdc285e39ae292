"""Hash routing: loads that are even by construction, and experts that follow from the position."""

import pytest
import torch

from vqmoe_vision.moe.methods.hashmoe import POSITIONS, HashConfig, HashRouter

from ..by_hand import assert_by_hand, expert


@pytest.mark.parametrize('top_k', [1, 2, 4])
def test_each_block_of_positions_has_every_expert_first_once(top_k):
    router = HashRouter(8, HashConfig(num_experts=4, top_k=top_k))
    first = router.hash[:, 0].view(-1, 4)
    assert torch.equal(first.sort(dim=1).values, torch.arange(4).expand_as(first))
    assert all(len(set(row)) == top_k for row in router.hash.tolist())  # different ones
    assert len({tuple(block) for block in first.tolist()}) == 24  # of 1,024 blocks, all orders


def test_a_token_goes_where_its_position_says_whatever_it_is():
    router = HashRouter(8, HashConfig(num_experts=4, top_k=2))
    one, other = router(torch.randn(3, 5, 8)), router(torch.randn(3, 5, 8))
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.indices, router.hash[:5].repeat(3, 1))
    assert one.weights.unique().tolist() == [0.5]
    assert router.hash.shape[0] == POSITIONS


@pytest.mark.parametrize('top_k', [1, 2])
def test_output_and_every_gradient(make_layer, top_k):
    net = make_layer('hashmoe', top_k=top_k)
    experts, table = net.layer.experts, net.layer.router.hash

    def naive(x):
        """The mean of the answers of the experts of a position, which repeat after the table."""
        places = [position % POSITIONS for position in range(x.shape[1])]
        answers = [
            [sum(expert(experts, e, token) for e in table[place]) / top_k for place, token in rows]
            for rows in (zip(places, image, strict=True) for image in x)
        ]
        return torch.stack([torch.stack(rows) for rows in answers])

    assert_by_hand(net, naive, torch.randn(2, 7, 8))
