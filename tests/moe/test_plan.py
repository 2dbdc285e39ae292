"""The rows of a dispatch: every assignment has one, each expert's stand together, padded or not."""

from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from vqmoe_vision.moe.kernels import cpu as plan_module
from vqmoe_vision.moe.kernels import make_plan

from .. import cases

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@given(
    st.integers(1, 6), st.integers(0, 60), st.integers(0, 2**31), DTYPES, st.sampled_from([1, 2])
)
def test_every_assignment_has_a_row_in_its_group(num_experts, size, seed, dtype, threads):
    torch.set_num_threads(threads)
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
        if expert < num_experts:  # rows that only fill a group are its own: nothing else leaks in
            filled = plan.order[start : bounds[expert + 1]]
            assert (indices[filled] == expert).all()


def groups(loads, dtype):
    indices = torch.repeat_interleave(torch.arange(len(loads)), torch.tensor(loads))
    return make_plan(indices, len(loads), dtype).offsets.diff(prepend=torch.zeros(1)).tolist()


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@cases(
    'loads, dtype, amx, threads, expected',
    # float32, two threads: even groups may add 32 rows per expert ...
    ([1032, 968], 'float32', True, 2, [1032, 1032]),
    ([1033, 967], 'float32', True, 2, [1033, 967]),
    # ... where not, neighbours may ...
    ([1000, 1030, 600, 610], 'float32', True, 2, [1030, 1030, 610, 610]),
    ([1000, 1070, 600, 610, 9], 'float32', True, 2, [1000, 1070, 610, 610, 9]),
    # ... and at most a quarter: 2 * 60 rows are 100 + 100 / 4 at most, 2 * 63 are not
    ([40, 60], 'float32', True, 2, [60, 60]),
    ([37, 63], 'float32', True, 2, [37, 63]),
    ([1001, 999], 'float32', True, 1, [1001, 999]),
    # neighbours only below float32 without AMX, in blocks of 8
    ([486, 440, 486, 486], 'bfloat16', False, 2, [488, 488, 488, 488]),
    ([486, 440], 'bfloat16', False, 2, [488, 488]),
    ([497, 431], 'bfloat16', False, 2, [504, 432]),
    ([486, 440], 'bfloat16', False, 1, [488, 440]),
    ([480, 490, 500], 'bfloat16', False, 2, [496, 496, 504]),
    # with AMX blocks of 32: 2 * 1056 rows for 1035 + 980 assignments are 97 more, where 2 * 50
    # are allowed on one thread; for 1035 + 970 they are 107 more
    ([1035, 980], 'bfloat16', True, 1, [1056, 1056]),
    ([1035, 970], 'bfloat16', True, 1, [1056, 992]),
    # and a twelfth more on two: 2 * 1088 for 1070 + 910 are 196 more, 100 + 165 are allowed
    ([1070, 910], 'bfloat16', True, 2, [1088, 1088]),
    ([1250, 730], 'bfloat16', True, 2, [1280, 736]),
    # above 128 blocks they double: of 16 above 1024 rows, of 32 above 2048
    ([1025, 2049, 9], 'bfloat16', False, 1, [1040, 2080, 16]),
    # never with an empty expert: there is nothing of its own to fill it with
    ([0, 150, 160], 'float16', True, 2, [0, 160, 160]),
    ([0, 20, 21], 'float32', True, 2, [0, 20, 21]),
)
def test_groups_are_even_where_it_costs_few_rows(loads, dtype, amx, threads, expected, monkeypatch):
    monkeypatch.setattr(plan_module, '_HAS_AMX', amx)
    torch.set_num_threads(threads)
    assert groups(loads, getattr(torch, dtype)) == expected


def test_a_compiled_plan_has_the_same_length_for_every_load():
    planned = torch.compile(make_plan, backend='eager', fullgraph=True)
    plans = [
        planned(torch.tensor(indices), 4, torch.bfloat16)
        for indices in ([0, 1, 2, 3] * 8, [0] * 32, [4] * 32)
    ]
    assert len({len(plan.order) for plan in plans}) == 1
    for plan in plans:
        assert plan.order[plan.inverse].tolist() == list(range(32))


@pytest.mark.parametrize('length', [8, 0])
def test_the_operator_is_registered_correctly(length):
    indices = torch.tensor([1, 0, 2, 1, 1])
    torch.library.opcheck(torch.ops.vqmoe_vision.padded_plan, (indices, 2, 1, length))
