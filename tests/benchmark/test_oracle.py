"""A contender that is wrong in any output or gradient is not timed."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmark import ours
from benchmark.cells import Cell, Settings
from benchmark.contenders import Contender, UnsuitableError
from benchmark.inputs import Batch, Inputs, skewed_routing
from benchmark.layers import OURS, PEERS, REFERENCES, measure_layer
from benchmark.networks import Comparison, Network, check_against_loops
from benchmark.oracle import WrongResultError, check_against_oracle
from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe.dispatch import run_experts
from vqmoe_vision.moe.experts import Experts
from vqmoe_vision.moe.kernels import Groups
from vqmoe_vision.moe.routing import Routing

from .. import cases

SMALL, TWICE = Cell(tokens=12, batch=2, width=16, experts=4, top_k=2), Settings(repeats=2)


@pytest.mark.parametrize('name', [name for name in OURS if name != 'loop'])
@cases(
    'backward, change',
    *((True, change) for change in (dict(top_k=1), dict(dtype='bfloat16', amp=True))),
    *((backward, dict(dtype='float64')) for backward in (True, False)),
)
def test_ours_equals_the_loop(name, backward, change):
    cell, settings = dataclasses.replace(SMALL, **change), Settings(backward=backward)
    inputs = Inputs(cell)
    try:
        (contender,) = OURS[name](cell, settings, inputs)
    except UnsuitableError as reason:
        pytest.skip(str(reason))
    check_against_oracle(contender, contender.given(inputs.batch(0)), cell, settings)


def swapped(module, batch: Batch) -> list[Tensor]:
    indices = batch.indices.clone()
    indices[0] = (indices[0] + 1) % module.num_experts  # one token of 24 to other experts
    return [run_experts(module, batch.x.flatten(0, 1), Routing(indices, batch.weights))]


def wrong_in(name: str) -> Callable:
    def forward(module, batch: Batch) -> list[Tensor]:
        leaf = getattr(batch, name)
        scaled = leaf * 1.1 - (leaf * 0.1).detach()  # its gradient is
        broken = dataclasses.replace(batch, **{name: scaled})
        return list(ours.experts_grouped(module, broken))

    return forward


def detached(module, batch: Batch) -> list[Tensor]:
    tokens, weights = batch.x.flatten(0, 1), batch.weights.detach()
    return [run_experts(module, tokens, Routing(batch.indices, weights))]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@cases(
    'broken, named',
    (swapped, 'output 0'),
    (wrong_in('x'), 'gradient of x'),
    (wrong_in('weights'), 'gradient of weights'),
    (detached, r"only one side has \['gradient of weights'\]"),
)
def test_a_broken_contender_is_refused(broken, named, dtype):
    cell = dataclasses.replace(SMALL, dtype=dtype)
    inputs = Inputs(cell)
    (contender,) = ours.ours(cell, TWICE, inputs)
    contender.forward = broken
    with pytest.raises(WrongResultError, match=named):
        check_against_oracle(contender, inputs.batch(0), cell, TWICE)


def test_nothing_is_timed_beside_a_broken_contender(monkeypatch):
    monkeypatch.setattr(ours, 'experts_grouped', swapped)
    monkeypatch.setattr('benchmark.layers.interleave', None)  # would fail if reached
    with pytest.raises(WrongResultError, match='ours in 2 x 12 tokens'):
        measure_layer(SMALL, TWICE, ('dense', 'bound', 'ours'))


def network(method: str) -> Network:
    model = f'vit_tiny_{method},depth=2,embed_dim=24,num_heads=2,num_experts=4'
    return Network(model, Comparison(models=(), batch=2, img_size=32), Settings())


@pytest.mark.parametrize('method', METHODS)
def test_every_method_equals_its_loops(method):
    check_against_loops(network(method))


def test_a_wrong_backend_is_not_timed(monkeypatch):
    right = Experts.forward

    def wrong(self: Experts, rows: torch.Tensor, groups: Groups) -> torch.Tensor:
        return right(self, rows, groups).flip(0)

    monkeypatch.setattr(Experts, 'forward', wrong)
    with pytest.raises(WrongResultError, match='differs from the plain loop; not timed'):
        check_against_loops(network('smoe'))


@cases(
    'experts, top_k, skew, fullest',
    # 240 tokens; the fullest expert has skew * 240 * K / E assignments
    (8, 1, 5.0, 150),
    (8, 1, 1.0, 30),
    (8, 2, 4.0, 240),
    (1, 1, 1.0, 240),
)
def test_fullest_expert_has_the_load_asked_for(experts, top_k, skew, fullest):
    cell = Cell(tokens=120, batch=2, width=4, experts=experts, top_k=top_k, skew=skew)
    indices = skewed_routing(cell, torch.Generator().manual_seed(0), full=experts - 1)
    counts = indices.flatten().bincount(minlength=experts)
    assert indices.shape == (240, top_k)
    assert counts[-1] == fullest
    assert counts.sum() == 240 * top_k


def test_a_round_repeats_and_the_next_differs():
    first, again, second = (vars(Inputs(SMALL).batch(index)) for index in (0, 0, 1))
    assert first.pop('decided') == {}
    assert (first['indices'][:, 0] != first['indices'][:, 1]).all()
    for name, value in first.items():
        assert torch.equal(value, again[name]) and not torch.equal(value, second[name])


# width 48: two thirds of its hidden width, 128, are whole and a multiple of eight
CELL = Cell(tokens=16, batch=2, width=48, experts=4, top_k=2)
# by hand: 2 * 16 tokens, two experts each, 2 * 48 * 192 in an expert
EXPERT_MACS = 32 * 2 * 2 * 48 * 192


def counted_macs(contender: Contender, use_oracle: bool = False) -> float:
    forward = contender.oracle if use_oracle else contender.forward
    assert forward is not None
    batch = contender.given(Inputs(CELL).batch(0))
    with FlopCounterMode(display=False) as counter:
        forward(contender.module, batch)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize('build', [ours.dense, ours.bound, ours.loop])
def test_floors_and_loop_do_the_experts_work(build):
    (contender,) = build(CELL, Settings(), Inputs(CELL))
    assert contender.macs == counted_macs(contender) == EXPERT_MACS


# the grouped operator is opaque to the counter, so the loops behind the oracles are counted
@pytest.mark.parametrize('name', OURS)
def test_formulas_of_ours_equal_a_count_of_their_oracles(name):
    try:
        (contender,) = OURS[name](CELL, Settings(), Inputs(CELL))
    except UnsuitableError as reason:  # of a method that has no form with two experts per token
        pytest.skip(str(reason))
    # of answers: what codes learn from in training is a product too
    contender.module.eval()
    assert contender.macs == counted_macs(contender, use_oracle=name != 'loop')
    # 32 tokens, two experts each; SoftMoE's slots come out even
    assert contender.rows == 64


@pytest.mark.parametrize('name', PEERS)
@pytest.mark.parametrize('backward', [True, False])
def test_peers_do_the_work_they_are_compared_at(name, backward):
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
