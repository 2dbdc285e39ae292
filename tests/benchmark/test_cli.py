"""The command: a tiny run end to end, and mistakes in one line."""

import json
from functools import partial

import pytest
import torch

from benchmark import cli
from benchmark.cells import Cell
from benchmark.cli import main
from benchmark.gates import Gate, elsewhere, judge, limit
from benchmark.layers import FLOORS, OURS
from benchmark.methods import LAYERS
from benchmark.networks import parse_model
from benchmark.presets import LAYER_PRESETS, NETWORK_PRESETS, Preset, ci_preset
from benchmark.timing import WARM_UP, interleave, median, peak_memory, ratio
from vqmoe_vision.moe import METHODS

from .. import cases

TINY = ['--tokens', '8', '--batch', '2', '--width', '8', '--experts', '4', '--repeats', '1']
TINY += ['--threads', '1']


def test_layers_end_to_end(tmp_path, capsys):
    out = tmp_path / 'new' / 'run.json'
    main(['moe', *TINY, '--top-k', '1', '2', '--contenders', *OURS, '--out', str(out)])
    run = json.loads(out.read_text())
    assert run['header']['isa'] and run['header']['versions']['torch']
    absent = [cell['reasons'] for cell in run['skipped']]
    assert absent[1] == {}  # every method can compute two experts per token
    assert [(row['top_k'], row['contender']) for row in run['rows']] == [
        (k, name) for k in (1, 2) for name in (*FLOORS, *OURS) if name not in absent[k - 1]
    ]
    for row in run['rows']:
        assert row['min_ms'] <= row['median_ms'] and row['peak_mb'] > 0
        assert row['tokens_per_expert'] == 4 * row['top_k']  # 16 tokens over 4 experts
    printed = capsys.readouterr().out
    assert '2 x 8 tokens, width 8, 4 experts, top-2, float32, skew 1' in printed


def test_models_end_to_end(tmp_path):
    out = tmp_path / 'run.json'
    tiny = 'depth=2,embed_dim=24,num_heads=2'
    models = ['--models', f'vit_tiny_smoe,top_k=1,{tiny}', '--baseline']
    options = '--img-size 32 --batch 2 --repeats 1 --threads 1 --dtype float32 bfloat16 --amp'
    command = ['model', *models, f'vit_tiny_patch16_224,{tiny}', *options.split()]
    main([*command, '--out', str(out)])
    rows = json.loads(out.read_text())['rows']
    assert [(row['amp'], row['mode']) for row in rows[::2]] == [
        (amp, mode) for amp in (False, True) for mode in ('inference', 'training')
    ]
    dense, smoe = rows[2:4]
    assert dense['to_baseline'] == 1.0
    assert list(smoe['parts_ms']) == ['forward', 'backward', 'optimizer']
    # one block of 8 experts, 7 of them idle: 7 * (2 * 24 * 96 + 96 + 24) parameters
    assert smoe['params'] - smoe['active_params'] == 7 * (2 * 24 * 96 + 96 + 24)
    assert smoe['images_per_s'] == pytest.approx(2000 / smoe['median_ms'])


def status_of(*arguments: str) -> int | str:
    """What the command ends with."""
    try:
        main(arguments)
    except SystemExit as stopped:
        return stopped.code
    return 0


@cases(
    'arguments, field',
    ('moe --contenders nobody', 'contenders='),
    ('moe --preset ci --tokens 3', '--preset='),
    ('moe --gate', '--gate='),
    ('moe --device cuda --clock process', 'clock='),
    ('moe --preset ci --mode fwd', '--mode='),
    ('moe --skew 9 --experts 8', 'skew='),
    ('model --threads 1 --models vit_tiny_smoe,x', 'models='),
)
def test_mistakes_are_one_line(arguments, field):
    line = status_of(*arguments.split())
    assert line.startswith('error: ') and field in line and '\n' not in line


@pytest.mark.parametrize('at_most', [1e-9, 1e9])
def test_a_preset_that_is_always_gated_ends_with_its_verdict(at_most, monkeypatch, capsys):
    gates = (limit('ours', 'dense', at_most),)
    cell = Cell(tokens=8, batch=2, width=8, experts=4)
    held = cli.Preset(runs=((cell, ('ours',)),), repeats=1, gates=gates, always_gated=True)
    monkeypatch.setitem(cli.LAYER_PRESETS, 'ci', held)
    status = status_of('moe', '--preset', 'ci', '--threads', '1')
    assert status == (at_most < 1)
    assert ('\nmissed' if status else '\nmet') in capsys.readouterr().out


def test_an_absent_peer_is_an_error_only_when_named(monkeypatch):
    monkeypatch.setattr('benchmark.layers.installed', lambda name: None)
    said = status_of('moe', '--contenders', 'soft-moe')
    assert "it is not installed: pip install '.[bench]'" in said
    assert status_of('moe', *TINY) == 0


def test_ratio_is_median_over_median():
    # medians 3 and 2; means would give 34.7 / 2
    assert median([1.0, 100.0, 3.0]) == 3.0
    assert ratio([1.0, 100.0, 3.0], [2.0, 1.0, 3.0]) == 1.5


def test_every_round_runs_every_step_and_warm_up_does_not_count():
    calls: list[tuple[int, str]] = []

    def step(index: int, name: str) -> dict[str, float]:
        calls.append((index, name))
        return {'step': float(index)}

    steps = {name: partial(step, name=name) for name in 'abc'}
    times = interleave(steps, 20)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert [sorted(r) for r in rounds] == [[(i, n) for n in 'abc'] for i in range(WARM_UP + 20)]
    assert len({tuple(name for _, name in r) for r in rounds}) > 1  # not always in one order
    assert times['a']['step'] == [float(WARM_UP + i) for i in range(20)]


def test_peak_counts_what_is_alive_together():
    def step() -> None:
        a = torch.empty(1000)  # 4,000 bytes
        b = torch.empty(500)  # 2,000 beside it: 6,000
        del a
        torch.empty(750)  # 3,000 beside b: 5,000
        del b

    # the allocator's sizes are exact, blocks are aligned but not rounded
    assert peak_memory(step, 'cpu') == pytest.approx(6000, abs=128)


CELL = dict(tokens=10, batch=2, width=8, experts=8, top_k=1, dtype='float32', amp=False, skew=1.0)
CELL |= {'mode': 'fwdbwd'}


def row(contender: str, median_ms: float, **fields) -> dict:
    return {**CELL, 'contender': contender, 'median_ms': median_ms, **fields}


def broken(gates, rows) -> list[dict]:
    return [row for row in judge(gates, rows) if row['result'] != 'met']


GATE = Gate(contender='ours', against='dense', at_most=1.2, where={'top_k': 1})
DENSE, LOW = row('dense', 10.0), {'dtype': 'bfloat16'}


@cases(
    'rows, ratios',
    ([row('ours', 12.0), DENSE], []),  # 12 / 10 = 1.2 is the limit
    ([row('ours', 12.1), DENSE], [1.21]),
    # 10 / 10 in float32; 30 / 10 in bfloat16, where dense of float32 must not be taken
    ([row('ours', 10.0), DENSE, row('ours', 30.0, **LOW), row('dense', 10.0, **LOW)], [3.0]),
    ([DENSE], [None]),
    ([row('ours', 10.0)], [None]),
)
def test_ratios_above_a_limit_and_those_without_rows_are_broken(rows, ratios):
    assert [missed['ratio'] for missed in broken([GATE], rows)] == ratios
    assert broken([GATE], [row('ours', float('nan')), DENSE])
    assert not broken([], [row('peer', 5.0, equal_to='layer', ours_to_peer=1.0)])
    (missed,) = broken([], [row('peer', 5.0, equal_to='layer', ours_to_peer=1.3)])
    assert missed['limit'].startswith('layer over peer at ')


def test_versus_compares_two_configurations_over_dense_of_each():
    gate = elsewhere(1.1, where={'experts': 64}, versus={'experts': 8, 'batch': 2})
    few = row('ours', 10.0, to_dense=1.25)  # dense takes 8 ms
    # 1.3 / 1.25 = 1.04, on a machine that is three times as slow by now
    many = row('ours', 3 * 84.0, experts=64, batch=16, to_dense=1.3)
    assert not broken([gate], [few, many])
    slow = row('ours', 84.0, experts=64, batch=16, to_dense=1.5)  # 1.5 / 1.25 = 1.2
    assert len(broken([gate], [few, slow])) == 1


def with_compiled(names: tuple[str, ...], preset: Preset) -> list[str]:
    return [*names, *(f'{name}+compiled' for name in names if preset.compiled)]


def test_every_method_is_in_the_tables():
    assert set(LAYERS.values()) == set(METHODS)
    measured = [set(names or ()) for _, names in LAYER_PRESETS['table'].runs]
    assert LAYERS.keys() <= set.union(*measured)
    for run in NETWORK_PRESETS['table'].comparisons:
        names = {parse_model(model)[0] for model in run.models}
        assert names == {f'vit_small_{method}' for method in METHODS}


def test_every_preset_measures_what_its_gates_judge():
    for preset in (*LAYER_PRESETS.values(), ci_preset(True), ci_preset(False)):
        rows = []
        for cell, names in preset.runs:
            names = ('dense', 'bound', *(names or ('loop', 'ours', 'layer')))
            for name in with_compiled(names, preset):
                measured = {'median_ms': 1e-9, 'to_dense': 1.0, 'expected_ms': 1.0}
                rows.append({**vars(cell), 'mode': 'fwdbwd', 'contender': name, **measured})
        assert all(row['ratio'] is not None for row in judge(preset.gates, rows))
    for preset in NETWORK_PRESETS.values():
        rows = [
            dict(batch=run.batch, tokens=197, dtype=run.dtype, amp=run.amp, mode=mode)
            | {'contender': name, 'median_ms': 1.0, 'expected_ms': 1.0}
            for run in preset.comparisons
            for name in with_compiled((run.baseline, *run.models), preset)
            for mode in run.modes
        ]
        assert not broken(preset.gates, rows)
    for row in rows:  # of the last preset, the gpu one, that is run beside no card
        del row['expected_ms']
    reasons = {row['result'] for row in judge(preset.gates, rows)}
    assert reasons == {'met', 'nothing to expect it by'}
