"""Contenders do equal work: their formulas against torch's own count of their products."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmark import ours
from benchmark.cells import Cell, Settings
from benchmark.contenders import Contender, UnsuitableError
from benchmark.inputs import Inputs
from benchmark.layers import OURS, PEERS, REFERENCES

# width 48: two thirds of its hidden width, 128, are whole and a multiple of eight
CELL = Cell(tokens=16, batch=2, width=48, experts=4, top_k=2)
# by hand: 2 * 16 tokens, two experts each, 2 * 48 * 192 in an expert
EXPERT_MACS = 32 * 2 * 2 * 48 * 192


def counted_macs(contender: Contender, use_oracle: bool = False) -> float:
    forward = contender.oracle if use_oracle else contender.forward
    assert forward is not None
    with FlopCounterMode(display=False) as counter:
        forward(contender.module, Inputs(CELL).batch(0))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize('build', [ours.dense, ours.bound, ours.loop])
def test_floors_and_loop_do_the_experts_work(build) -> None:
    (contender,) = build(CELL, Settings(), Inputs(CELL))
    assert contender.macs == counted_macs(contender) == EXPERT_MACS


# the grouped operator is opaque to the counter, so the loops behind the oracles are counted
@pytest.mark.parametrize('name', OURS)
def test_formulas_of_ours_equal_a_count_of_their_oracles(name: str) -> None:
    try:
        (contender,) = OURS[name](CELL, Settings(), Inputs(CELL))
    except UnsuitableError as reason:  # of a method that has no form with two experts per token
        pytest.skip(str(reason))
    assert contender.macs == counted_macs(contender, use_oracle=name != 'loop')
    # 32 tokens, two experts each; SoftMoE's slots come out even
    assert contender.rows == 64


@pytest.mark.parametrize('name', PEERS)
@pytest.mark.parametrize('backward', [True, False])
def test_peers_do_the_work_they_are_compared_at(name: str, backward: bool) -> None:
    if name not in REFERENCES:
        pytest.importorskip(name.replace('-', '_'))
    made = PEERS[name](CELL, Settings(backward=backward), Inputs(CELL))
    ours_by_name = {c.name: c for c in made if c.equal_to is None}
    peers = [c for c in made if c.equal_to is not None]
    assert peers
    for peer in peers:
        equal = ours_by_name[peer.equal_to]
        # at most one place per expert and batch more or less: 4 of 64 assignments
        assert abs(peer.rows - equal.rows) <= (4 if peer.drop_rate else 0)
        if 'grouped_mm' not in peer.name:  # which the counter does not know
            assert peer.macs == counted_macs(peer)
