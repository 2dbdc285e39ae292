"""How `make gpu-check` compares kernels with plain loops, on the CPU."""

import re
from dataclasses import replace

import pytest
import torch.nn.functional as F

from benchmark import gpu_kernels
from benchmark.cells import DTYPES, Cell, Settings
from benchmark.inputs import Inputs
from vqmoe_vision.moe.kernels import KERNELS

CELL = Cell(tokens=17, batch=2, width=32, top_k=2)
CPU = Settings(device='cpu')


def test_every_kernel_in_every_dtype_and_case():
    rows = gpu_kernels.check_kernels(CPU, CELL)
    dtypes = [*DTYPES, 'bfloat16 amp', 'float16 amp']
    assert [(row['dtype'], row['case'], row['kernel']) for row in rows] == [
        (dtype, case, kernel)
        for dtype in dtypes
        for case in gpu_kernels.CASES
        for kernel in KERNELS
    ]
    assert all(row['ok'] for row in rows)
    different = {(row['kernel'], row['dtype']) for row in rows if row['result'] != 'equal'}
    # torch has no grouped_mm of float64, and before 2.10 none at all
    without = ['float64'] if hasattr(F, 'grouped_mm') else dtypes
    assert different == {('grouped_mm', dtype) for dtype in without}


def test_cases_have_what_their_names_say():
    batch = Inputs(CELL).batch(0)
    cases = {name: change(batch) for name, change in gpu_kernels.CASES.items()}
    for name, (case, kept) in cases.items():
        assert (kept is not None) == ('dropped' in name)
        experts = [1, 2, 3, 5, 6] if name == 'experts without rows' else list(range(8))
        assert case.indices.unique().tolist() == ([] if name == 'no rows' else experts)
    kept = cases['dropped rows'][1]
    assert kept.any() and not kept.all()
    assert not cases['all rows dropped'][1].any()
    none = cases['no rows'][0]
    assert none.x.numel() == none.indices.numel() == none.weights.numel() == 0


def replaced(monkeypatch, grouped_linear):
    """As `batched`, which runs with any torch, by another function."""
    right = KERNELS['batched']
    monkeypatch.setitem(KERNELS, 'batched', replace(right, grouped_linear=grouped_linear))
    return right.grouped_linear


def failures():
    failed = [row for row in gpu_kernels.check_kernels(CPU, CELL) if not row['ok']]
    assert {row['kernel'] for row in failed} == {'batched'}
    return failed


def test_a_kernel_that_is_wrong_is_found(monkeypatch):
    right = replaced(monkeypatch, lambda x, w, b, o: right(x, w.flip(0), b, o))
    assert 'from the plain loop' in failures()[0]['result']


@pytest.mark.parametrize(
    ('case', 'wrong'),
    [
        ('experts without rows', lambda x, o: (o.diff(prepend=o.new_zeros(1)) == 0).any()),
        ('dropped rows', lambda x, o: 0 < o[-1] < len(x)),
        ('all rows dropped', lambda x, o: o[-1] == 0 < len(x)),
        ('no rows', lambda x, o: len(x) == 0),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_a_kernel_that_fails_in_one_case_is_found(monkeypatch, case, wrong):
    def fails(x, weight, bias, offsets):
        if wrong(x, offsets):
            raise RuntimeError('CUDA error: misaligned address\nand more lines')
        return right(x, weight, bias, offsets)

    right = replaced(monkeypatch, fails)
    found = [row for row in failures() if row['case'] == case]
    # in every dtype, with autocast and without
    assert len(found) == len(DTYPES) + 2
    place = r'vqmoe_vision/moe/kernels/__init__\.py:\d+'
    for row in found:
        message = rf'RuntimeError: CUDA error: misaligned address \({place}\)'
        assert re.fullmatch(message, row['result'])


@pytest.mark.parametrize('message', ['x is not possible: 1', 'sizes differ'])
def test_a_value_error_of_a_kernel_is_no_refusal_of_a_dtype(monkeypatch, message):
    def fails(*args):
        raise ValueError(message)

    replaced(monkeypatch, fails)
    assert len(failures()) == (len(DTYPES) + 2) * len(gpu_kernels.CASES)
