"""Hash routing: loads that are even by construction, and experts that follow from the position."""

import pytest
import torch

from vqmoe_vision.moe.methods.hashmoe import POSITIONS, HashConfig, HashRouter


@pytest.mark.parametrize('top_k', [1, 2, 4])
def test_each_block_of_positions_has_every_expert_first_once(top_k: int) -> None:
    router = HashRouter(8, HashConfig(num_experts=4, top_k=top_k))
    first = router.hash[:, 0].view(-1, 4)
    assert torch.equal(first.sort(dim=1).values, torch.arange(4).expand_as(first))
    assert all(len(set(row)) == top_k for row in router.hash.tolist())  # different ones
    assert len({tuple(block) for block in first.tolist()}) == 24  # of 1,024 blocks, all orders


def test_a_token_goes_where_its_position_says_whatever_it_is() -> None:
    router = HashRouter(8, HashConfig(num_experts=4, top_k=2))
    one, other = router(torch.randn(3, 5, 8)), router(torch.randn(3, 5, 8))
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.indices, router.hash[:5].repeat(3, 1))
    assert one.weights.unique().tolist() == [0.5]
    assert router.hash.shape[0] == POSITIONS


def test_positions_repeat_after_the_table() -> None:
    router = HashRouter(1, HashConfig(num_experts=2))
    indices = router(torch.zeros(1, POSITIONS + 3, 1)).indices
    assert torch.equal(indices[POSITIONS:], indices[:3])


def test_layers_are_hashed_apart_and_a_layer_keeps_its_hash(make_layer) -> None:
    one, other = make_layer('hashmoe').layer.router, make_layer('hashmoe').layer.router
    assert not torch.equal(one.hash, other.hash)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.hash, other.hash)


def test_known_answer(make_layer) -> None:
    # two experts per token at weight one half: the mean of both answers
    layer = make_layer('hashmoe', top_k=2).layer
    x = torch.randn(2, 3, 8)
    both = layer.router.hash[:3]
    ends = torch.arange(1, 5, dtype=torch.int32) * 6
    everywhere = layer.experts(x.flatten(0, 1).repeat(4, 1), ends).view(4, 2, 3, 8)
    for position, (a, b) in enumerate(both.tolist()):
        expected = (everywhere[a, :, position] + everywhere[b, :, position]) / 2
        torch.testing.assert_close(layer(x)[:, position], expected)
