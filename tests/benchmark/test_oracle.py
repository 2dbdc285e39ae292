"""A contender that is wrong in any output or gradient is not timed."""

import dataclasses
from collections.abc import Callable

import pytest
from torch import Tensor

from benchmark import ours
from benchmark.cells import Cell, Settings
from benchmark.contenders import UnsuitableError
from benchmark.inputs import Batch, Inputs
from benchmark.layers import OURS, measure_layer
from benchmark.oracle import WrongResultError, check_against_oracle
from vqmoe_vision.moe.dispatch import run_experts
from vqmoe_vision.moe.routing import Routing


def changed(**fields) -> Callable[[Cell], Cell]:
    return lambda cell: dataclasses.replace(cell, **fields)


@pytest.mark.parametrize('name', [name for name in OURS if name != 'loop'])
@pytest.mark.parametrize('backward', [True, False])
@pytest.mark.parametrize(
    'change',
    [
        changed(),
        changed(top_k=1),
        changed(dtype='float64'),
        changed(dtype='bfloat16'),
        changed(dtype='bfloat16', amp=True),
    ],
)
def test_ours_equals_the_loop(name: str, backward: bool, change, cell: Cell) -> None:
    cell, settings = change(cell), Settings(backward=backward)
    inputs = Inputs(cell)
    try:
        (contender,) = OURS[name](cell, settings, inputs)
    except UnsuitableError as reason:
        pytest.skip(str(reason))
    check_against_oracle(contender, inputs.batch(0), cell, settings)


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The same value with a wrong gradient."""
    return tensor * factor - (tensor * (factor - 1)).detach()


def swapped(module, batch: Batch) -> list[Tensor]:
    indices = batch.indices.clone()
    indices[0] = (indices[0] + 1) % module.num_experts  # one token of 24 to other experts
    return [run_experts(module, batch.x.flatten(0, 1), Routing(indices, batch.weights))]


def wrong_in(name: str) -> Callable:
    def forward(module, batch: Batch) -> list[Tensor]:
        leaf = getattr(batch, name)
        broken = dataclasses.replace(batch, **{name: scale_gradient(leaf, 1.1)})
        return list(ours.experts_grouped(module, broken))

    return forward


def detached(module, batch: Batch) -> list[Tensor]:
    tokens, weights = batch.x.flatten(0, 1), batch.weights.detach()
    return [run_experts(module, tokens, Routing(batch.indices, weights))]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
    ('broken', 'named'),
    [
        (swapped, 'output 0'),
        (wrong_in('x'), 'gradient of x'),
        (wrong_in('weights'), 'gradient of weights'),
        (detached, r"only one side has \['gradient of weights'\]"),
    ],
)
def test_a_broken_contender_is_refused(broken, named, dtype, cell: Cell, settings) -> None:
    cell = dataclasses.replace(cell, dtype=dtype)
    inputs = Inputs(cell)
    (contender,) = ours.ours(cell, settings, inputs)
    contender.forward = broken
    with pytest.raises(WrongResultError, match=named):
        check_against_oracle(contender, inputs.batch(0), cell, settings)


def test_nothing_is_timed_beside_a_broken_contender(monkeypatch, cell: Cell, settings) -> None:
    monkeypatch.setattr(ours, 'experts_grouped', swapped)
    monkeypatch.setattr('benchmark.layers.interleave', None)  # would fail if reached
    with pytest.raises(WrongResultError, match='ours in 2 x 12 tokens'):
        measure_layer(cell, settings, ('dense', 'bound', 'ours'))
