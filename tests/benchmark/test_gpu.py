"""What `make gpu-check` does on a card, on the CPU, and with a card that waits."""

import pytest
import torch

from benchmark import gpu
from benchmark.cells import DTYPES, Cell, Settings
from benchmark.cli import main
from vqmoe_vision.moe import METHODS, kernels
from vqmoe_vision.moe.kernels import KERNELS

CELL = Cell(tokens=17, batch=2, width=32, top_k=2)
SIZES = dict(depth=2, embed_dim=16, num_heads=2, patch_size=8)
CPU = Settings(device='cpu')


@pytest.fixture
def card_that_waits(monkeypatch):
    """Waiting is forbidden on the CPU as on a card: what asks for a number of a tensor fails."""
    forbidden = []

    def mode(value):
        forbidden[:] = [value] if value == 'error' else []

    item = torch.Tensor.item

    def watched(tensor):
        if forbidden:
            raise RuntimeError('called a synchronizing CUDA operation\nin item')
        return item(tensor)

    monkeypatch.setattr(torch.cuda, 'get_sync_debug_mode', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', mode)
    monkeypatch.setattr(torch.Tensor, 'item', watched)
    return forbidden


def test_every_kernel_in_every_dtype():
    rows = gpu.check_kernels(CPU, CELL)
    assert [(row['dtype'], row['kernel']) for row in rows] == [
        (dtype, kernel) for dtype in DTYPES for kernel in KERNELS
    ]
    assert all(row['ok'] for row in rows)
    different = [row for row in rows if row['result'] != 'equal']
    # torch has no grouped_mm of float64
    assert [(row['kernel'], row['dtype']) for row in different] == [('grouped_mm', 'float64')]


def test_a_kernel_that_is_wrong_is_found(monkeypatch):
    right = kernels.choice.GROUPED_MM
    wrong = kernels.choice.Kernel(
        lambda x, w, b, o: right.grouped_linear(x, w.flip(0), b, o), right.misfit
    )
    monkeypatch.setitem(KERNELS, 'grouped_mm', wrong)
    failed = [row for row in gpu.check_kernels(CPU, CELL) if not row['ok']]
    assert {row['kernel'] for row in failed} == {'grouped_mm'}
    assert 'from the plain loop' in failed[0]['result']


def test_every_method_takes_steps_and_one_that_waits_is_found(card_that_waits):
    rows = gpu.check_methods(CPU, SIZES, 32)
    assert len(rows) == len(METHODS) + 1 and all(row['ok'] for row in rows)
    assert 'cpu has no waits' in rows[0]['result']
    with gpu.waiting_forbidden('cuda'):
        assert card_that_waits == ['error']
        with pytest.raises(RuntimeError, match='synchronizing'):
            torch.ones(()).item()
    assert card_that_waits == []
    row = gpu._row('step', lambda index: torch.ones(()).item(), Settings(device='cpu'))
    assert row['ok']  # the CPU has nothing to wait for
    object.__setattr__(settings := Settings(device='cpu'), 'device', 'cuda')
    row = gpu._row('step', lambda index: torch.ones(()).item(), settings)
    assert row == {'step': 'step', 'result': 'called a synchronizing CUDA operation', 'ok': False}


@pytest.mark.long
def test_a_config_of_each_task_runs():
    pytest.importorskip('mmseg')
    rows = gpu.check_configs(CPU)
    assert [row['step'].partition(':')[0] for row in rows] == list(gpu.CONFIGS)
    assert all(row['ok'] for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a card')
def test_without_a_card_it_says_so():
    with pytest.raises(SystemExit, match='no usable CUDA device'):
        main(['gpu'])
