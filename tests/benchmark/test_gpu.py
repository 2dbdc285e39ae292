"""What `make gpu-check` does on a card, on the CPU, and with a card that waits."""

import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmark import cli, gpu
from benchmark.cells import DTYPES, Cell, Settings
from benchmark.cli import main
from benchmark.inputs import Inputs
from benchmark.oracle import WrongResultError
from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe.kernels import KERNELS, grouped_linear, use_kernel
from vqmoe_vision.moe.routing import perplexity

CELL = Cell(tokens=17, batch=2, width=32, top_k=2)
SIZES = dict(depth=2, embed_dim=16, num_heads=2, patch_size=8)
CPU = Settings(device='cpu')


@pytest.fixture
def card_that_waits(monkeypatch):
    """Waiting is forbidden on the CPU as on a card: what asks for a number of a tensor fails."""
    forbidden = []

    def mode(value):
        forbidden[:] = [value] if value == 'error' else []

    def watched(read):
        def reads(tensor):
            if forbidden:
                raise RuntimeError('called a synchronizing CUDA operation\nin item')
            return read(tensor)

        return reads

    monkeypatch.setattr(torch.cuda, 'get_sync_debug_mode', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', mode)
    for name in ('item', 'tolist'):
        monkeypatch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
    return forbidden


def test_every_kernel_in_every_dtype_and_case():
    rows = gpu.check_kernels(CPU, CELL)
    dtypes = [*DTYPES, 'bfloat16 amp', 'float16 amp']
    assert [(row['dtype'], row['case'], row['kernel']) for row in rows] == [
        (dtype, case, kernel) for dtype in dtypes for case in gpu.CASES for kernel in KERNELS
    ]
    assert all(row['ok'] for row in rows)
    different = {(row['kernel'], row['dtype']) for row in rows if row['result'] != 'equal'}
    # torch has no grouped_mm of float64, and before 2.10 none at all
    without = ['float64'] if hasattr(F, 'grouped_mm') else dtypes
    assert different == {('grouped_mm', dtype) for dtype in without}


def test_cases_have_what_their_names_say():
    batch = Inputs(CELL).batch(0)
    cases = {name: change(batch) for name, change in gpu.CASES.items()}
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
    failed = [row for row in gpu.check_kernels(CPU, CELL) if not row['ok']]
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
    place = r'vqmoe_vision/moe/kernels/choice\.py:\d+'
    for row in found:
        message = rf'RuntimeError: CUDA error: misaligned address \({place}\)'
        assert re.fullmatch(message, row['result'])


@pytest.mark.parametrize('message', ['x is not possible: 1', 'sizes differ'])
def test_a_value_error_of_a_kernel_is_no_refusal_of_a_dtype(monkeypatch, message):
    def fails(*args):
        raise ValueError(message)

    replaced(monkeypatch, fails)
    assert len(failures()) == (len(DTYPES) + 2) * len(gpu.CASES)


def test_a_kernel_that_is_wrong_under_autocast_alone_is_found(monkeypatch):
    right = replaced(
        monkeypatch,
        lambda x, w, b, o: right(x, w.flip(0) if torch.is_autocast_enabled('cpu') else w, b, o),
    )
    assert {row['dtype'] for row in failures()} == {'bfloat16 amp', 'float16 amp'}


def test_what_cannot_be_built_is_a_row_for_each_dtype(monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(gpu, 'ours', fails)
    rows = gpu.check_kernels(CPU, CELL)
    assert [row['dtype'] for row in rows] == [*DTYPES, 'bfloat16 amp', 'float16 amp']
    assert all(not row['ok'] and 'CUDA out of memory' in row['result'] for row in rows)
    monkeypatch.setattr(gpu, 'Network', fails)
    rows = gpu.check_methods(CPU, SIZES, 32)
    assert len(rows) == len(METHODS) + 1
    assert all(not row['ok'] and 'CUDA out of memory' in row['result'] for row in rows)


@pytest.mark.parametrize(
    'error',
    [ValueError('x'), AssertionError('x'), FloatingPointError('x'), ImportError('x')],
    ids=repr,
)
def test_any_error_of_a_step_is_its_row(error):
    def step(index):
        raise error

    row = gpu._row('step', lambda: step, CPU)
    assert not row['ok']
    assert re.fullmatch(rf'{type(error).__name__}: x \(test_gpu\.py:\d+\)', row['result'])


def test_every_method_takes_steps_and_one_that_waits_is_found(card_that_waits):
    rows = gpu.check_methods(CPU, SIZES, 32)
    assert len(rows) == len(METHODS) + 1 and all(row['ok'] for row in rows)
    assert 'cpu has no waits' in rows[0]['result']
    with gpu.waiting_forbidden('cuda'):
        assert card_that_waits == ['error']
        with pytest.raises(RuntimeError, match='synchronizing'):
            torch.ones(()).item()
    assert card_that_waits == []
    row = gpu._row('step', lambda: lambda index: torch.ones(()).item(), CPU)
    assert row['ok']  # the CPU has nothing to wait for


@pytest.mark.parametrize('backward', [False, True])
def test_where_a_step_waits_is_said(card_that_waits, backward):
    x, weight, ends = torch.ones(2, 4), torch.ones(2, 4, 4), torch.tensor([1, 2]).int()
    with use_kernel('batched'):
        out = grouped_linear(x.requires_grad_(), weight, None, ends)

    def step(index):
        if backward:
            out.sum().backward(retain_graph=True)
        else:
            perplexity(torch.ones(2))

    object.__setattr__(settings := Settings(device='cpu'), 'device', 'cuda')
    row = gpu._row('step', lambda: step, settings)
    result, _, place = row['result'].rpartition(' (')
    assert (result, row['ok']) == ('RuntimeError: called a synchronizing CUDA operation', False)
    where = 'kernels/batched' if backward else 'routing'
    file, line = place.rstrip(')').split(':')
    assert file == f'vqmoe_vision/moe/{where}.py'
    lines = (gpu.PACKAGE.parent / file).read_text().splitlines()
    assert ('.tolist()' if backward else '.item()') in lines[int(line) - 1]


@pytest.mark.long
def test_a_config_of_each_task_runs_from_anywhere(monkeypatch, tmp_path):
    pytest.importorskip('mmseg')
    monkeypatch.chdir(tmp_path)
    rows = gpu.check_configs(CPU)
    assert [row['step'].partition(':')[0] for row in rows] == [
        'classification',
        *('segmentation' for _ in METHODS),
    ]
    assert [row for row in rows if not row['ok']] == []


@pytest.mark.parametrize('task', gpu.CONFIGS)
def test_configs_are_found_from_anywhere(monkeypatch, tmp_path, task):
    pytest.importorskip('mmseg')
    monkeypatch.chdir(tmp_path)

    def stop(config):
        raise FloatingPointError(config.train_dataloader.dataset.type)

    monkeypatch.setattr(gpu, 'running', stop)
    row = gpu._config_row(task, [], CPU)
    assert not row['ok'] and re.match('FloatingPointError: (digits|DigitScenes) ', row['result'])


def test_a_run_is_saved_after_each_stage(monkeypatch, tmp_path):
    file, saved = tmp_path / 'row.json', []
    wrong = {'kernel': 'batched', 'result': 'off', 'ok': False}

    def methods(settings):
        saved.append(json.loads(file.read_text()))
        return []

    def layers(preset, settings):
        raise WrongResultError('ours is off; not timed')

    def networks(preset, settings):
        saved.append(json.loads(file.read_text()))
        return [{'contender': 'dense', 'median_ms': 1.0}], []

    monkeypatch.setattr(cli, 'check_kernels', lambda settings: [wrong])
    monkeypatch.setattr(cli, 'check_methods', methods)
    monkeypatch.setattr(cli, 'check_configs', lambda settings: [])
    monkeypatch.setattr(cli, '_run_layers', layers)
    monkeypatch.setattr(cli, '_run_models', networks)
    with pytest.raises(SystemExit) as stopped:
        main(['gpu', '--device', 'cpu', '--out', str(file)])
    assert stopped.value.code == 1
    assert saved[0]['kernels'] == saved[0]['failed'] == [wrong] and 'methods' not in saved[0]
    assert [row.get('step') for row in saved[1]['failed']] == [None, 'layers']
    assert 'WrongResultError: ours is off' in saved[1]['failed'][1]['result']
    assert json.loads(file.read_text())['networks'] == networks(None, CPU)[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a card')
def test_without_a_card_it_says_so():
    with pytest.raises(SystemExit, match='no usable CUDA device'):
        main(['gpu'])
