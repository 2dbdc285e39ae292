"""The command: a tiny run end to end, and mistakes in one line."""

import json
from pathlib import Path

import pytest

from benchmark import cli
from benchmark.cells import Cell
from benchmark.cli import main
from benchmark.gates import limit
from benchmark.layers import FLOORS, OURS

TINY = ['--tokens', '8', '--batch', '2', '--width', '8', '--experts', '4', '--repeats', '1']
TINY += ['--threads', '1']


def test_layers_end_to_end(tmp_path: Path, capsys) -> None:
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


def test_models_end_to_end(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ('arguments', 'field'),
    [
        ('moe --contenders nobody', 'contenders='),
        ('moe --preset ci --tokens 3', '--preset='),
        ('moe --gate', '--gate='),
        ('moe --device cuda --clock process', 'clock='),
        ('moe --preset ci --mode fwd', '--mode='),
        ('moe --repeats 0', 'repeats='),
        ('moe --skew 9 --experts 8', 'skew='),
        ('model --threads 1 --models vit_tiny_smoe,x', 'models='),
    ],
)
def test_mistakes_are_one_line(arguments: str, field: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    line = str(exit_.value.code)
    assert line.startswith('error: ') and field in line and '\n' not in line


@pytest.mark.parametrize('at_most', [1e-9, 1e9])
def test_a_preset_that_is_always_gated_ends_with_its_verdict(at_most, monkeypatch, capsys) -> None:
    gates = (limit('ours', 'dense', at_most),)
    cell = Cell(tokens=8, batch=2, width=8, experts=4)
    held = cli.Preset(runs=((cell, ('ours',)),), repeats=1, gates=gates, always_gated=True)
    monkeypatch.setitem(cli.LAYER_PRESETS, 'ci', held)
    status = 0
    try:
        main(['moe', '--preset', 'ci', '--threads', '1'])
    except SystemExit as stopped:
        status = stopped.code
    assert status == (at_most < 1)
    assert ('\nmissed' if status else '\nmet') in capsys.readouterr().out


def test_an_absent_peer_is_an_error_only_when_named(monkeypatch) -> None:
    monkeypatch.setattr('benchmark.layers.installed', lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        main(['moe', '--contenders', 'soft-moe'])
    assert "it is not installed: pip install '.[bench]'" in str(exit_.value.code)
    main(['moe', *TINY])
