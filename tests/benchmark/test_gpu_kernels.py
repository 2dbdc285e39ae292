"""How `make gpu-check` compares kernels with plain loops, on the CPU."""

from dataclasses import replace

import torch.nn.functional as F

from benchmark import gpu_kernels
from benchmark.cells import DTYPES, Cell, Settings
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
