"""The kernel in Triton without a card: run by its interpreter, compiled for cards, and traced."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses import FakeTensorMode

from vqmoe_vision.moe import dispatch, kernels
from vqmoe_vision.moe.kernels import use_kernel

from .. import cases
from .naive_experts import make_case, run_and_backward

triton = pytest.importorskip('triton', reason='the extra `triton` is not installed, or not for it')

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vqmoe_vision.moe.kernels import triton as ours  # noqa: E402

INTERPRETED = ours.INTERPRETED
REFERENCE = Path(__file__).with_name('test_kernels.py')
SHORT = {torch.bfloat16: 'bf16', torch.float16: 'fp16', torch.float32: 'fp32'}
TARGETS = {
    'A100': ('cuda', 80, 32),
    '4090': ('cuda', 89, 32),
    'H100': ('cuda', 90, 32),
    'RTX 50': ('cuda', 120, 32),
    'MI300': ('hip', 'gfx942', 64),
}


# of 16 bits one dtype
@cases(
    'kept, number',
    ('not torch.float16', 12),
    pytest.param('torch.float16', 6, marks=pytest.mark.long),
)
def test_every_case_of_every_kernel_in_its_interpreter(kept, number):
    told = {'TRITON_INTERPRET': '1', 'PYTEST_ADDOPTS': ''}
    call = [sys.executable, '-m', 'pytest', '-q', '-x', '-k', f'triton and {kept}']
    run = subprocess.run(
        [*call, '-p', 'tests.moe.bfloat16', '-p', 'no:cacheprovider', REFERENCE],
        env=os.environ | told,
        cwd=Path(__file__).parents[2],
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0, run.stdout
    assert int(re.search(r'(\d+) passed', run.stdout)[1]) == number


class Launches:
    """In place of `wrap_triton`: what would run on a card."""

    def __init__(self):
        self.all = []

    def __call__(self, kernel):
        self.kernel = kernel
        return self

    def __getitem__(self, grid):
        return lambda *args, **options: self.all.append((self.kernel, args, options))


def source_of(kernel, args, options):
    """As Triton's launcher makes it of arguments: what divides by 16, and a 1, are compiled in."""
    given = dict(zip(kernel.arg_names, args, strict=False))
    tensors = {n: SHORT.get(a.dtype, 'i32') for n, a in given.items() if torch.is_tensor(a)}
    numbers = {n: a for n, a in given.items() if n not in tensors}
    fixed = {n: o for n, o in options.items() if n in kernel.arg_names}
    fixed |= {n: a for n, a in numbers.items() if a == 1}
    types = {n: f'*{t}' for n, t in tensors.items()} | dict.fromkeys(numbers, 'i32')
    even = [n for n in given if n in tensors or numbers[n] % 16 == 0]
    place = kernel.arg_names.index
    return ASTSource(
        kernel,
        {n: 'constexpr' if n in fixed else types[n] for n in kernel.arg_names},
        {(place(n),): value for n, value in fixed.items()},
        {(place(n),): [['tt.divisibility', 16]] for n in even if n not in fixed},
    )


# what multiplies on the cores made for it; on NVIDIA there are none for float32
MATRIX = {'A100': 'mma.sync', '4090': 'mma.sync', 'H100': 'wgmma', 'RTX 50': 'mma.sync'}


PLAIN = torch.bfloat16, (384, 1536)
MORE = (torch.float16, PLAIN[1]), (torch.float32, PLAIN[1]), (torch.bfloat16, (35, 11))


@cases(
    'card, dtype, widths',
    *((card, *PLAIN) for card in ('A100', 'MI300')),
    *(pytest.param(card, *PLAIN, marks=pytest.mark.long) for card in ('4090', 'H100', 'RTX 50')),
    *(pytest.param(card, *case, marks=pytest.mark.long) for card in TARGETS for case in MORE),
)
def test_it_compiles_for_cards(monkeypatch, tmp_path, card, dtype, widths):
    monkeypatch.setenv('TRITON_DEFAULT_FP_FUSION', '1')  # without a word Triton 3.9 warns
    monkeypatch.setattr(triton.knobs.cache, 'dir', str(tmp_path))
    monkeypatch.setattr(ours, 'wrap_triton', launches := Launches())
    n, k = widths
    sizes = dict(x=(999, k), weight=(8, n, k), bias=(8, n), grad=(999, n))
    made = {name: torch.empty(size, device='meta', dtype=dtype) for name, size in sizes.items()}
    ends = torch.empty(8, device='meta', dtype=torch.int32)
    ours.product(made['x'], made['weight'], made['bias'], ends)
    ours.gradients(made['grad'], made['x'], made['weight'], ends, [True] * 3)
    assert len(launches.all) == 3  # forward, gradients of rows, of weight and bias
    for kernel, args, options in launches.all:
        picked = {name: options[name] for name in ('num_warps', 'num_stages')}
        source = source_of(kernel, args, options)
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[card]), options=picked)
        assert compiled.metadata.shared <= 48 * 1024
        code = compiled.asm.get('ptx') or compiled.asm['amdgcn']
        if card == 'MI300' or dtype != torch.float32:
            assert MATRIX.get(card, 'mfma') in code


def test_it_is_launched_on_the_card_of_its_tensors(monkeypatch):
    now, seen = [0], []

    def exchange(device):
        now[0], before = device, now[0]
        return before

    class Launch:
        def __getitem__(self, _grid):
            return lambda *_, **__: seen.append(now[0])

    for name in ('_exchange_device', '_maybe_exchange_device'):
        monkeypatch.setattr(torch.cuda, name, exchange)
    monkeypatch.setattr(ours, 'wrap_triton', lambda kernel: Launch())
    with FakeTensorMode():
        x, weight, bias = (torch.empty(s, device='cuda:1') for s in ((9, 8), (2, 4, 8), (2, 4)))
        ends = torch.empty(2, device='cuda:1', dtype=torch.int32)
        out = ours._launch_product(x, weight, bias, ends)
        ours.gradients._init_fn(out, x, weight, ends, [True] * 3)
    assert seen == [1, 1, 1] and now == [0]


@cases(
    'call',
    lambda kind: subprocess.check_call(['false']),  # as of a compiler without Python's headers
    lambda kind: subprocess.check_call(['there is none']),
)
def test_experts_run_where_triton_cannot(monkeypatch, call):
    monkeypatch.setattr(ours, 'builds_for', call)
    with pytest.warns(UserWarning, match='Triton cannot run'):
        assert kernels._triton.__wrapped__('cuda') is None


class Seen(Exception):
    """A graph was seen, and is not to be run."""


# dynamo reads the gradients of what it traces, where other tests have left it some
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor:UserWarning')
def test_a_compiler_sees_the_kernels_in_one_graph(monkeypatch):
    monkeypatch.setattr(kernels, '_has_triton', lambda device: True)
    called = []

    def partition(joint, *_, **__):
        called.extend(str(node.target) for node in joint.graph.nodes)
        raise Seen

    experts, x, indices, weights = make_case(300, 4, 2, 24, 40, bias=True)
    case = experts.float(), x.float(), indices.contiguous(), weights.float()
    backend = aot_autograd(fw_compiler=make_boxed_func, partition_fn=partition)
    run = torch.compile(dispatch.run_experts, fullgraph=True, backend=backend)
    with use_kernel('triton'), pytest.raises(BackendCompilerFailed) as stopped:
        run_and_backward(run, *case)
    assert isinstance(stopped.value.inner_exception, Seen)
    # of both layers one forward, one for rows, one for weight and bias; nothing is opaque
    assert sum('triton_kernel_wrapper' in name for name in called) == 6
    assert not any('tiled' in name or 'grouped' in name for name in called)
