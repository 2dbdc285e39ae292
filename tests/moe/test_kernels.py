"""Every kernel against plain loops, on CPU tensors, and the one place that chooses one."""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

from vqmoe_vision.moe import dispatch, kernels
from vqmoe_vision.moe.kernels import KERNELS, Groups, grouped_linear, make_plan, use_kernel
from vqmoe_vision.moe.kernels import cpu as plan_module

from .. import cases, refused
from .naive_experts import TOLERANCES, assert_same, make_case, naive, run_and_backward

UP_TO_6 = st.integers(1, 6)
# Triton's interpreter needs a process of its own, see test_triton.py
RUN_HERE = [name for name in KERNELS if (name == 'triton') == ('TRITON_INTERPRET' in os.environ)]


def compare(case, dtype, kernel, kept=None, looser=1):
    """A kernel in `dtype` with the naive loops in float64, from numbers that `dtype` can hold."""
    experts, x, indices, weights = case
    experts.to(dtype).double()
    x, weights = x.to(dtype).double(), weights.to(dtype).double()
    expected = run_and_backward(naive, experts, x, indices, weights, kept)
    experts, x, weights = experts.to(dtype), x.to(dtype), weights.to(dtype)
    with use_kernel(kernel):
        found = run_and_backward(dispatch.run_experts, experts, x, indices, weights, kept)
    assert {value.dtype for value in found.values()} == {dtype}
    found = {name: value.double() for name, value in found.items()}
    assert_same(found, expected, **{n: looser * x for n, x in TOLERANCES[dtype].items()})


@pytest.mark.parametrize('kernel', RUN_HERE)
@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@settings(max_examples=25 if RUN_HERE[1:] else 2, deadline=None)
@given(st.integers(1, 40), UP_TO_6, UP_TO_6, st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_outputs_and_every_gradient(kernel, dtype, tokens, num_experts, k, bias, drop, seed):
    case = make_case(tokens, num_experts, min(k, num_experts), 8, 16, bias, seed)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(case[2].shape, generator=generator) < 0.6 if drop else None
    if kept is not None:
        kept[0, 0] = True  # naive loops without any assignment have no gradient
    compare(case, dtype, kernel, kept)


@pytest.mark.parametrize('kernel', RUN_HERE)
@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@cases('widths, bias', ((72, 136), True), ((150, 35), False))
def test_groups_of_several_tiles(kernel, dtype, widths, bias):
    case = make_case(200, 5, 2, *widths, bias)
    case[2][:100] = torch.tensor([3, 1])  # skewed, and experts 0 and 4 have none
    case[2][case[2] % 4 == 0] = 3
    kept = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) < 0.8
    if KERNELS[kernel].fits(torch.device('cpu'), dtype, (5, *widths)):
        compare(case, dtype, kernel, kept, looser=6)  # sums of up to 180


@pytest.mark.parametrize('bias', [True, False])
def test_what_a_card_leaves_undefined_is_read_by_nobody(monkeypatch, bias):
    """A CPU fills with zeros what CUDA promises nothing of, and so hides who reads it."""
    exact, calls = F.grouped_mm, []

    def as_on_a_card(a, b, *, offs):
        result = exact(a, b, offs=offs)
        calls.append(result.ndim)
        if result.ndim == 2:
            result[offs[-1] :] = torch.nan  # rows past the last end
        else:
            result[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan  # groups without rows
        return result

    monkeypatch.setattr(F, 'grouped_mm', as_on_a_card)
    case = make_case(9, 5, 2, 8, 16, bias)
    case[2][:] = torch.tensor([3, 1])  # experts 0, 2 and 4 have none
    kept = torch.ones(9, 2, dtype=torch.bool)
    kept[4:] = False
    compare(case, torch.float32, 'grouped_mm', kept)
    # two layers: answers and gradients of rows, of weights, and of biases as a product with ones
    assert (calls.count(2), calls.count(3)) == (4, 4 if bias else 2)


@pytest.mark.parametrize('kernel', RUN_HERE)
@pytest.mark.parametrize('expanded', [True, False])
def test_no_rows_at_all(kernel, expanded):
    """A process of expert parallelism may get none, and a sum gives an expanded gradient."""
    x, weight, bias = (torch.ones(s, requires_grad=True) for s in ((0, 8), (2, 4, 8), (2, 4)))
    rows = x[:, :1].expand(0, 8) if expanded else x
    with use_kernel(kernel):
        out = grouped_linear(rows, weight, bias, Groups(torch.zeros(2, dtype=torch.int32)))
        assert out.shape == (0, 4)
        out.backward(out.new_ones(()).expand(0, 4) if expanded else torch.ones(0, 4))
    for leaf in (x, weight, bias):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize('kernel', RUN_HERE)
def test_weights_and_biases_may_lie_in_any_order(kernel):
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randn(s, generator=generator) for s in ((8, 6), (3, 8, 4), (4, 3)))
    leaves = [drawn.mT.requires_grad_() for drawn in draws]
    ends, found = torch.tensor([2, 3, 6], dtype=torch.int32), []
    for name in (kernel, 'reference'):
        with use_kernel(name):
            out = grouped_linear(*leaves, Groups(ends))
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


CHOSEN = (
    (torch.bfloat16, (2, 16, 8), None, 'batched'),
    (torch.bfloat16, (2, 16, 8), (9, 0), 'grouped_mm'),
    (torch.bfloat16, (2, 12, 8), (9, 0), 'triton'),
    # its launch has a thread for each group
    (torch.bfloat16, (1023, 8, 8), (9, 0), 'grouped_mm'),
    (torch.bfloat16, (1024, 8, 8), (9, 0), 'triton'),
    (torch.float32, (2, 16, 8), (9, 0), 'triton'),
    (torch.float16, (2, 16, 8), (9, 0), 'triton'),
    (torch.float64, (2, 16, 8), (9, 0), 'batched'),
    (torch.bfloat16, (2, 16, 8), (8, 0), 'triton'),
    (torch.bfloat16, (2, 16, 8), (7, 5), 'batched'),
)


@pytest.mark.parametrize('case', range(len(CHOSEN)))
def test_a_kernel_is_chosen_by_device_and_dtype(monkeypatch, case):
    dtype, shape, card, expected = CHOSEN[case]
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: card)
    ours = SimpleNamespace(compiles_for=lambda device: card >= (8, 0))
    monkeypatch.setattr(kernels, '_triton', lambda kind: ours)
    asked = torch.device('cuda' if card else 'cpu'), dtype, shape
    assert kernels.kernel_of(*asked) == expected
    if shape[0] == 1024:
        with use_kernel('grouped_mm'):
            refused("^kernel='grouped_mm' .* 1024 experts", kernels.kernel_of, *asked)
    if expected == 'grouped_mm':
        monkeypatch.setattr(torch.version, 'hip', '6.4')  # its cards report the same capability
        assert kernels.kernel_of(*asked) == 'triton'
        monkeypatch.setattr(kernels, '_triton', lambda kind: None)
        assert kernels.kernel_of(*asked) == 'batched'


@cases('dtype, width', (torch.float64, 8), (torch.bfloat16, 12), (torch.float32, 6))
def test_a_kernel_that_cannot_run_or_does_not_exist(dtype, width):
    x, weight = torch.zeros(4, 8, dtype=dtype), torch.zeros(2, width, 8, dtype=dtype)
    with use_kernel('grouped_mm'), pytest.raises(ValueError, match=r'^kernel='):
        grouped_linear(x, weight, None, Groups(torch.tensor([2, 4], dtype=torch.int32)))
    with pytest.raises(ValueError, match=r'^kernel='), use_kernel('fast'):
        pass


def test_a_compiler_chooses_no_strides_of_what_torchs_operator_takes():
    torch._dynamo.reset()
    experts, x, indices, weights = make_case(9, 4, 1, 8, 16, bias=True)
    case = experts.bfloat16(), x.bfloat16(), indices.contiguous(), weights.bfloat16()
    called = []

    def compiler(graph, _inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    with use_kernel('grouped_mm'):
        backend = aot_autograd(fw_compiler=compiler)
        compiled = torch.compile(dispatch.run_experts, backend=backend, fullgraph=True)
        run_and_backward(compiled, *case)
    # two layers, of each a product forward and three backward
    assert sum('grouped_product' in name for name in called) == 2 * 4
    assert not any('_grouped_mm' in name for name in called)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('kernel', RUN_HERE)
@cases(
    'shape, drop', ((12, 4, 1, 8, 16), False), ((12, 4, 2, 8, 16), True), ((12, 4, 2, 5, 11), True)
)
def test_autocast_computes_low_and_returns_gradients_in_float32(shape, drop, kernel, dtype):
    experts, x, indices, weights = make_case(*shape, bias=True)
    experts, x, weights = experts.float(), x.float(), weights.float()
    if not KERNELS[kernel].fits(x.device, dtype, (4, *shape[3:])):
        pytest.skip('widths')  # which a test of its own sees refused
    kept = torch.rand(weights.shape) < 0.6 if drop else None
    expected = run_and_backward(naive, experts, x, indices, weights, kept)
    with use_kernel(kernel), torch.autocast('cpu', dtype):
        actual = run_and_backward(dispatch.run_experts, experts, x, indices, weights, kept)
    dtypes = {name: value.dtype for name, value in actual.items()}
    assert dtypes.pop('out') == dtype
    assert set(dtypes.values()) == {torch.float32}
    assert_same(actual, expected, **TOLERANCES[dtype])


DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@given(UP_TO_6, st.integers(0, 60), st.integers(0, 2**31), DTYPES, st.sampled_from([1, 2]))
def test_every_assignment_has_a_row_in_its_group(num_experts, size, seed, dtype, threads):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, num_experts + 1, (size,), generator=generator)  # E = dropped
    plan = make_plan(indices, num_experts, dtype)
    assert plan.groups.ends.dtype == torch.int32
    assert plan.order[plan.inverse].tolist() == list(range(size))  # so no row has two
    bounds = [0, *plan.groups.ends.tolist(), len(plan.order)]
    assert bounds == sorted(bounds)
    for expert in range(num_experts + 1):
        rows = plan.inverse[indices == expert].tolist()
        start = bounds[expert]
        assert rows == list(range(start, start + len(rows)))  # dense, in the assignments' order
        assert start + len(rows) <= bounds[expert + 1]
        if expert < num_experts:  # rows that only fill a group are its own: nothing else leaks in
            filled = plan.order[start : bounds[expert + 1]]
            assert (indices[filled] == expert).all()


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
    ([497, 431], 'bfloat16', False, 2, [504, 432]),
    ([486, 440], 'bfloat16', False, 1, [488, 440]),
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
    ([0, 20, 21], 'float32', True, 2, [0, 20, 21]),
)
def test_groups_are_even_where_it_costs_few_rows(loads, dtype, amx, threads, expected, monkeypatch):
    monkeypatch.setattr(plan_module, '_HAS_AMX', amx)
    torch.set_num_threads(threads)
    indices = torch.repeat_interleave(torch.arange(len(loads)), torch.tensor(loads))
    ends = make_plan(indices, len(loads), getattr(torch, dtype)).groups.ends
    assert ends.diff(prepend=torch.zeros(1)).tolist() == expected


def test_a_compiled_plan_has_the_same_length_for_every_load():
    planned = torch.compile(make_plan, backend='eager', fullgraph=True)
    cases = ([0, 1, 2, 3] * 8, [0] * 32, [4] * 32)
    plans = [planned(torch.tensor(indices), 4, torch.bfloat16) for indices in cases]
    assert len({len(plan.order) for plan in plans}) == 1
    assert all(plan.order[plan.inverse].tolist() == list(range(32)) for plan in plans)


def test_operations_of_grouped_mm_are_counted():
    experts, x, indices, weights = make_case(9, 4, 1, 8, 16, bias=False)
    case = experts.bfloat16(), x.bfloat16(), indices, weights.bfloat16()
    with use_kernel('grouped_mm'), FlopCounterMode(display=False) as counter:
        run_and_backward(dispatch.run_experts, *case)
    # 9 rows through 8 x 16 and 16 x 8, each with the gradients of rows and of weights
    assert counter.get_total_flops() == 3 * 2 * (2 * 9 * 8 * 16)
