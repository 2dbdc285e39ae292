"""Constants that are measured again: all there are, with their own values, and put back."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmark.cells import Cell, Settings
from benchmark.cli import main
from benchmark.contenders import Contender
from benchmark.inputs import Inputs
from benchmark.tune import CONSTANTS, changed, deciding, with_value
from vqmoe_vision.moe.kernels import cpu, make_plan

# what they mean is no measurement
FACTS = {'_HAS_AMX', '_ALL'}


def test_every_constant_is_measured_beside_its_own_value() -> None:
    names = {name for name in vars(cpu) if name.startswith('_') and name.isupper()}
    assert names - FACTS == CONSTANTS.keys()
    for name, constant in CONSTANTS.items():
        assert getattr(cpu, name) in constant.values


def test_a_constant_is_changed_inside_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, '_HAS_AMX', False)
    indices = torch.tensor([0] * 9 + [1] * 20)
    with pytest.raises(KeyError), changed('_BLOCK', 4):
        # 9 and 20 rows in whole blocks of 4
        assert make_plan(indices, 2, torch.bfloat16).offsets.tolist() == [12, 32]
        raise KeyError
    assert make_plan(indices, 2, torch.bfloat16).offsets.tolist() == [16, 40]


def test_a_contender_plans_with_the_value_it_is_given(cell: Cell) -> None:
    def forward(module: nn.Module, batch) -> list[torch.Tensor]:
        return [make_plan(batch.indices.flatten(), cell.experts, torch.float32).offsets]

    plain, batch = Contender('ours', nn.Identity(), forward, 0, 0), Inputs(cell).batch(0)
    even = with_value(plain, '_SPARE_ALONE', 64)  # pairs of experts get one size
    ends = [contender.forward(contender.module, batch)[0].tolist() for contender in (plain, even)]
    sizes = [[end - start for start, end in zip([0, *e], e, strict=False)] for e in ends]
    assert len(set(sizes[0])) > 1 and sizes[1] == [max(sizes[0])] * 4


def test_values_run_side_by_side(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(cpu, '_HAS_AMX', False)
    small = dataclasses.replace(CONSTANTS['_SPARE_ALONE'], cells=(cell,))
    monkeypatch.setitem(CONSTANTS, '_SPARE_ALONE', small)
    out = tmp_path / 'run.json'
    names = ['_SPARE_ALONE', '_RUNS', '_AMX_BLOCK']
    main(['tune', '--constants', *names, '--threads', '1', '--repeats', '2', '--out', str(out)])
    run = json.loads(out.read_text())
    values = [f'_SPARE_ALONE = {value}' for value in (0, 16, 32, 64)]
    assert [row['contender'] for row in run['rows']] == ['dense', 'bound', *values]
    assert [row['contender'] for row in run['rows'] if row['chosen']] == ['_SPARE_ALONE = 0']
    for row in run['rows']:
        assert row['low'] <= row['high'] and row['peak_mb'] > 0
        assert not row['chosen'] or row['low'] == row['high'] == row['to_chosen'] == 1
    # what decides nothing here is said, with the reason
    assert run['skipped'] == {
        '_RUNS in float32': 'needs --threads 2 or more',
        '_AMX_BLOCK in bfloat16': 'of processors with AMX',
    }
    assert '_RUNS in float32: not run, needs --threads 2 or more' in capsys.readouterr().out


def test_only_values_that_decide_something_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, '_HAS_AMX', True)
    low = Cell(tokens=70, width=8, batch=4, experts=4, dtype='bfloat16')  # about 70 rows each
    settings = Settings(threads=2, repeats=3)
    # the longest group has 80, 96 and 128 rows with blocks of 16, 32 and 64
    assert deciding('_AMX_BLOCK', low, settings) == [16, 64]
    # loads below 32 blocks of 32 are in blocks of 32 with each of the values
    assert deciding('_MOST_BLOCKS', low, settings) == []


def test_every_constant_decides_something_in_one_of_its_cells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr('benchmark.tune.computes', lambda dtype: True)
    threads_before = torch.get_num_threads()
    try:
        for name, constant in CONSTANTS.items():
            monkeypatch.setattr(cpu, '_HAS_AMX', bool(constant.amx))
            threads = 1 if constant.threads == 'one' else 2
            torch.set_num_threads(threads)
            settings = Settings(threads=threads, repeats=5)
            found = [deciding(name, cell, settings) for cell in constant.cells]
            assert any(found), name
    finally:
        torch.set_num_threads(threads_before)


def test_amx_changes_nothing_for_a_constant_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    single, low = Cell(tokens=8), Cell(tokens=8, dtype='bfloat16')
    monkeypatch.setattr('benchmark.tune.computes', lambda dtype: True)
    for amx in (False, True):
        monkeypatch.setattr(cpu, '_HAS_AMX', amx)
        assert CONSTANTS['_SPARE'].absent(single, 2) is None
        assert (CONSTANTS['_SPARE'].absent(low, 2) is None) is not amx
        assert (CONSTANTS['_AMX_SPARE'].absent(low, 2) is None) is amx
