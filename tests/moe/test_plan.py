"""The rows of a dispatch: every assignment has one, each expert's stand together, padded or not."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from vqmoe_vision.moe.plan import ROW_BLOCK, make_plan


@given(
    st.integers(1, 6),
    st.integers(0, 60),
    st.integers(0, 2**31),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_every_assignment_has_a_row_in_its_group(num_experts, size, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, num_experts + 1, (size,), generator=generator)  # E = dropped
    plan = make_plan(indices, num_experts, dtype)
    assert plan.offsets.dtype == torch.int32
    assert plan.order[plan.inverse].tolist() == list(range(size))  # so no row has two
    bounds = [0, *plan.offsets.tolist(), len(plan.order)]
    assert bounds == sorted(bounds)
    for expert in range(num_experts + 1):
        rows = plan.inverse[indices == expert].tolist()
        start = bounds[expert]
        assert rows == list(range(start, start + len(rows)))  # dense, in the assignments' order
        assert start + len(rows) <= bounds[expert + 1]


def groups(loads, dtype):
    """Sizes of the groups for loads."""
    indices = torch.repeat_interleave(torch.arange(len(loads)), torch.tensor(loads))
    return make_plan(indices, len(loads), dtype).offsets.diff(prepend=torch.zeros(1)).tolist()


@pytest.mark.parametrize(
    ('loads', 'dtype', 'expected'),
    [
        # 2 * 12 rows, at most 20 + 20 / 4
        ([8, 12], torch.float32, [12, 12]),
        ([7, 13], torch.float32, [7, 13]),
        # below float32 whole blocks of 16: 4 * 48 rows, at most 160 + 160 / 4 + 4 * 15
        ([40, 36, 40, 44], torch.bfloat16, [48, 48, 48, 48]),
        ([40, 10, 40, 70], torch.bfloat16, [48, 16, 48, 80]),
        ([0, 3, 160], torch.float16, [0, 16, 160]),
    ],
)
def test_groups_are_even_where_that_costs_few_rows(loads, dtype, expected):
    assert ROW_BLOCK == 16
    assert groups(loads, dtype) == expected


def test_a_compiled_plan_has_the_same_length_for_every_load():
    planned = torch.compile(make_plan, backend='eager', fullgraph=True)
    plans = [
        planned(torch.tensor(indices), 4, torch.bfloat16)
        for indices in ([0, 1, 2, 3] * 8, [0] * 32, [4] * 32)
    ]
    assert len({len(plan.order) for plan in plans}) == 1
    for plan in plans:
        assert plan.order[plan.inverse].tolist() == list(range(32))


@pytest.mark.parametrize('static', [True, False])
def test_the_operator_is_registered_correctly(static):
    indices = torch.tensor([1, 0, 2, 1, 1])
    torch.library.opcheck(torch.ops.vqmoe_vision.padded_plan, (indices, 2, 1, static))
