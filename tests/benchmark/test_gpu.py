"""What `make gpu-check` makes of its parts: one row, saved after each, and limits."""

import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmark import gpu, gpu_kernels, gpu_steps
from benchmark.cells import DTYPES, Cell, Settings
from benchmark.cli import main
from benchmark.gpu_stages import PACKAGE
from benchmark.oracle import WrongResultError
from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe.kernels import KERNELS, grouped_linear, use_kernel
from vqmoe_vision.moe.routing import perplexity

# issue's figures for an H100: width to an MoE over dense, in the layer and in a whole ViT
OVER_DENSE = {384: 1.20, 768: 1.11, 1024: 1.09}
VITS = {'small': 384, 'base': 768, 'large': 1024}
FAST, WRONG = 10.0, {'kernel': 'batched', 'result': 'off', 'ok': False}
WIDTHS = sorted(OVER_DENSE)


@pytest.fixture
def measured(monkeypatch):
    """Nothing is measured: milliseconds of a contender are looked up, else `FAST`."""
    milliseconds = {}

    def rows(names, **fields):
        return [
            {'contender': name, 'median_ms': milliseconds.get((fields['width'], name), FAST)}
            | fields
            for plain in names
            for name in (plain, f'{plain}+compiled')
        ]

    def layers(runs, settings):
        ((cell, names),) = runs
        assert settings.compiled and cell.num_tokens >= 25_000
        return rows(('dense', *names), **vars(cell), mode='fwdbwd'), []

    def networks(comparisons, settings):
        (run,) = comparisons
        assert settings.compiled and run.batch * 197 >= 25_000
        width = VITS[run.baseline.split('_')[1]]
        fields = dict(width=width, batch=run.batch, tokens=197, dtype=run.dtype, mode='training')
        return rows((run.baseline, *run.models), **fields)

    for name in ('check_kernels', 'check_methods', 'check_configs'):
        monkeypatch.setattr(gpu, name, lambda settings: [])
    monkeypatch.setattr(gpu, 'run_layers', layers)
    monkeypatch.setattr(gpu, 'run_networks', networks)
    return milliseconds


def check(folder, *options):
    """The row of a run, and the status that the command ends with."""
    status, out = 0, folder / 'row.json'
    try:
        main(['gpu', '--device', 'cpu', '--out', str(out), *options])
    except SystemExit as stopped:
        status = stopped.code
    return json.loads(out.read_text()), status


def missed(run):
    return [row['limit'] for row in run['limits'] if row['result'] == 'missed']


@pytest.mark.parametrize('form', ['', '+compiled'])
@pytest.mark.parametrize('width, what', [*zip(WIDTHS, ('ours', 'layer', 'network'), strict=True)])
def test_an_moe_is_held_to_its_share_over_dense(measured, tmp_path, width, what, form):
    smoe, dense = what, 'dense'
    if what == 'network':
        size = next(size for size, known in VITS.items() if known == width)
        smoe, dense = f'vit_{size}_smoe,top_k=1', f'vit_{size}_patch16_224'
    # both forms, lest the compiled one be slower than the eager one
    at_most = OVER_DENSE[width]
    measured[width, smoe] = measured[width, f'{smoe}+compiled'] = FAST * (at_most - 0.001)
    run, status = check(tmp_path)
    assert missed(run) == [] and status == 0
    measured[width, smoe + form] = FAST * (at_most + 0.001)
    run, status = check(tmp_path)
    (name,) = missed(run)
    assert name.startswith(f'{smoe}{form}') and f' over {dense}{form} at 128 x 197' in name
    assert status == 0  # a report, unless asked for
    assert check(tmp_path, '--gate')[1] == 1


def test_a_run_is_saved_after_each_part_and_after_one_that_fails(measured, monkeypatch, tmp_path):
    file, saved = tmp_path / 'row.json', []

    def networks(preset, settings):
        saved.append(json.loads(file.read_text()))
        return timed(preset, settings)

    def layers(preset, settings):
        raise WrongResultError('ours is off; not timed')

    timed = gpu.run_networks
    monkeypatch.setattr(gpu, 'check_kernels', lambda settings: [WRONG])
    monkeypatch.setattr(gpu, 'run_layers', layers)
    monkeypatch.setattr(gpu, 'run_networks', networks)
    run, status = check(tmp_path)
    assert status == 1
    parts = [row.get('step') for row in saved[0]['failed']]
    assert parts == [None, *(f'layers of width {width}' for width in WIDTHS)]
    assert 'WrongResultError: ours is off' in saved[0]['failed'][1]['result']
    sizes = [{row['width'] for row in after['networks']} for after in (*saved[1:], run)]
    assert sizes == [{384}, {384, 768}, {384, 768, 1024}]


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
    here = {('triton', dtype) for dtype in dtypes}  # on a CPU only its interpreter runs
    assert different == {('grouped_mm', dtype) for dtype in without} | here


def test_a_kernel_that_is_wrong_is_found(monkeypatch):
    right = KERNELS['batched']  # which runs with any torch
    wrong = replace(right, product=lambda x, w, *to: right.product(x, w.flip(0), *to))
    monkeypatch.setitem(KERNELS, 'batched', wrong)
    failed = [row for row in gpu_kernels.check_kernels(CPU, CELL) if not row['ok']]
    assert {row['kernel'] for row in failed} == {'batched'}
    assert 'from the plain loop' in failed[0]['result']


SIZES = dict(depth=2, embed_dim=16, num_heads=2, patch_size=8)


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


def test_every_method_takes_steps_and_one_that_waits_is_found(card_that_waits):
    rows = gpu_steps.check_methods(CPU, SIZES, 32)
    assert len(rows) == len(METHODS) + 1 and all(row['ok'] for row in rows)
    assert 'cpu has no waits' in rows[0]['result']
    with gpu_steps.waiting_forbidden('cuda'):
        assert card_that_waits == ['error']
        with pytest.raises(RuntimeError, match='synchronizing'):
            torch.ones(()).item()
    assert card_that_waits == []
    row = gpu_steps._row('step', lambda: lambda index: torch.ones(()).item(), CPU, False)
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
    row = gpu_steps._row('step', lambda: step, settings, may_wait=True)
    assert row['ok'] and row['result'].startswith('runs; experts wait')
    row = gpu_steps._row('step', lambda: step, settings, may_wait=False)
    result, _, place = row['result'].rpartition(' (')
    assert (result, row['ok']) == ('RuntimeError: called a synchronizing CUDA operation', False)
    where = 'kernels/cpu' if backward else 'routing'
    file, line = place.rstrip(')').split(':')
    assert file == f'vqmoe_vision/moe/{where}.py'
    lines = (PACKAGE.parent / file).read_text().splitlines()
    assert ('.tolist()' if backward else '.item()') in lines[int(line) - 1]


@pytest.mark.parametrize('task', gpu_steps.CONFIGS)
def test_configs_are_found_from_anywhere(monkeypatch, tmp_path, task):
    pytest.importorskip('mmseg')
    monkeypatch.chdir(tmp_path)

    def stop(config, device, waits):
        raise FloatingPointError(config.train_dataloader.dataset.type)

    monkeypatch.setattr(gpu_steps, '_train', stop)
    row = gpu_steps._config_row(task, {}, CPU)
    assert not row['ok'] and re.match('FloatingPointError: (digits|DigitScenes) ', row['result'])
