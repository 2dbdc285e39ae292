"""What `make gpu-check` makes of its parts: one row, saved after each, and limits."""

import json
import re
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from benchmark import gpu, gpu_kernels, gpu_results
from benchmark.cells import DTYPES, Cell, Settings
from benchmark.gates import SLACK
from benchmark.gpu_card import Card, measure_card, work_of
from benchmark.oracle import WrongResultError
from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe.kernels import KERNELS

from .. import mostly_long
from .test_cli import status_of

VITS = {'small': 384, 'base': 768, 'large': 1024}
EXPECTED = 2.0  # of an MoE over dense
FAST, WRONG = 10.0, {'kernel': 'batched', 'result': 'off', 'ok': False}
CARD = Card({torch.float32: 24.0}, bytes=56.0, launch=1.0)


@pytest.fixture
def measured(monkeypatch):
    """Nothing is measured: milliseconds of a contender are looked up, else `FAST`."""
    milliseconds = {}

    def rows(names, width, **fields):
        for name in (one for plain in names for one in (plain, f'{plain}+compiled')):
            timed = {'contender': name, 'median_ms': milliseconds.get((width, name), FAST)}
            expected = 1.0 if 'dense' in name or 'patch16' in name else EXPECTED
            yield {**fields, **timed, 'width': width, 'expected_ms': expected}

    def layers(runs, settings):
        ((cell, names),) = runs
        assert settings.compiled and cell.num_tokens >= 25_000
        return [*rows(('dense', *names), **vars(cell), mode='fwdbwd')], []

    def networks(comparisons, settings):
        (run,) = comparisons
        assert settings.compiled and run.batch * 197 >= 25_000
        fields = dict(batch=run.batch, tokens=197, dtype=run.dtype, mode='training')
        return [*rows((run.baseline, *run.models), VITS[run.baseline.split('_')[1]], **fields)]

    for name in ('check_kernels', 'check_results', 'check_configs'):
        monkeypatch.setattr(gpu, name, lambda settings: [])
    monkeypatch.setattr(gpu, 'measure_card', lambda device: CARD)
    monkeypatch.setattr(gpu, 'first_line', lambda settings, header: 'a line')
    monkeypatch.setattr(gpu, 'run_layers', layers)
    monkeypatch.setattr(gpu, 'run_networks', networks)
    return milliseconds


def check(folder, *options):
    """The row of a run, and the status that the command ends with."""
    out = folder / 'row.json'
    status = status_of('gpu', '--device', 'cpu', '--out', str(out), *options)
    return json.loads(out.read_text()), status


def missed(run):
    return [row['limit'] for row in run['limits'] if row['result'] == 'missed']


@pytest.mark.parametrize('size, what', [*zip(VITS, ('ours', 'layer', 'network'), strict=True)])
def test_an_moe_is_held_to_what_its_work_lets_expect(measured, tmp_path, size, what):
    smoe, dense, width = what, 'dense', VITS[size]
    if what == 'network':
        smoe, dense = f'vit_{size}_smoe,top_k=1', f'vit_{size}_patch16_224'
    most = FAST * EXPECTED * SLACK
    measured[width, smoe] = measured[width, f'{smoe}+compiled'] = most - 0.001
    run, status = check(tmp_path)
    assert missed(run) == [] and status == 0 and run['header']['line'] == 'a line'
    assert {row['expected'] for row in run['limits'] if row['expected']} == {EXPECTED}
    measured[width, smoe], measured[width, f'{smoe}+compiled'] = most + 0.001, 1.06 * most
    run, status = check(tmp_path)
    sides = [re.match(r'(\S+) .*?over (\S+) ', name) for name in missed(run)]
    assert [side.groups() for side in sides] == [(smoe, dense), (f'{smoe}+compiled', smoe)]
    assert status == 0  # a report, unless asked for
    assert check(tmp_path, '--gate')[1] == 1


def test_a_run_is_saved_after_each_part_and_after_one_that_fails(measured, monkeypatch, tmp_path):
    timed, saved = gpu.run_networks, []

    def networks(preset, settings):
        saved.append(json.loads((tmp_path / 'row.json').read_text()))
        return timed(preset, settings)

    def layers(preset, settings):
        raise WrongResultError('ours is off; not timed')

    monkeypatch.setattr(gpu, 'check_kernels', lambda settings: [WRONG])
    monkeypatch.setattr(gpu, 'run_layers', layers)
    monkeypatch.setattr(gpu, 'run_networks', networks)
    run, status = check(tmp_path)
    assert status == 1
    parts = [row.get('step') for row in saved[0]['failed']]
    assert parts == [None, *(f'layers of width {width}' for width in VITS.values())]
    assert 'WrongResultError: ours is off' in saved[0]['failed'][1]['result']
    sizes = [{row['width'] for row in after['networks']} for after in (*saved[1:], run)]
    assert sizes == [{384}, {384, 768}, {384, 768, 1024}]


CELL = Cell(tokens=17, batch=2, width=32, top_k=2)
CPU = Settings(device='cpu')


def test_every_kernel_in_every_dtype_and_case():
    rows = gpu_kernels.check_kernels(CPU, CELL)
    dtypes = [*DTYPES, 'bfloat16 amp', 'float16 amp']
    expected = [*product(dtypes, gpu_kernels.CASES, KERNELS)]
    assert [(row['dtype'], row['case'], row['kernel']) for row in rows] == expected
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


SIZES = dict(depth=2, embed_dim=16, num_heads=2, num_experts=4)


@pytest.mark.parametrize('method', mostly_long(METHODS, 'vqmoe'))
def test_trainings_in_every_way(monkeypatch, method):
    monkeypatch.setattr(gpu_results, 'METHODS', {method: METHODS[method]})
    rows = gpu_results.check_results(CPU, SIZES, ('compiled',))  # for minutes
    assert [row for row in rows if not row['ok']] == [] and len(rows) == 1 + 10
    assert {row['result'] for row in rows[1:]} == {'equal, 0 waits a step'}


def test_a_step_is_expected_to_take_as_long_as_its_operators():
    x, weight = torch.zeros(4, 3), torch.zeros(2, 3)
    bias = torch.zeros(2)
    work = work_of(lambda: F.gelu(F.linear(x, weight, bias)))
    # 4 x 3 x 2 products and as many sums, of 12, 6 and 2 numbers into 8; then of these into 8
    assert work.operators == [(48, torch.float32, 112), (0, torch.float32, 64)]
    # 48 / 24 = 112 / 56 = 2 seconds, and 64 / 56
    assert CARD.expected_ms(work) == pytest.approx(2000 + 64 / 56 * 1000)
    moment = [torch.zeros(3), torch.zeros(3)]
    (work,) = work_of(lambda: torch._foreach_mul_(moment, 2.0)).operators
    assert work == (0, torch.float32, 2 * 24)  # read and written


def test_the_first_line_says_what_a_layer_takes():
    settings, cell = replace(CPU, card=measure_card('cpu', large=32)), replace(CELL, top_k=1)
    line = gpu.first_line(settings, {'device': 'cpu'}, replace(cell, dtype='bfloat16'))
    said = r'cpu, .* TFLOP/s, .* batched, 0 waits a step, layer [\d.]+ ms \([\d.]+ ex'
    assert re.match(said, line)
