"""Rows that today's code does not repeat are stale."""

import math
from pathlib import Path

import pytest

from vqmoe_vision.comparison import check
from vqmoe_vision.comparison.check import compared

ROWS = Path('docs/results/rows/spec')


def table() -> str:
    return Path('docs/results/tables/spec.md').read_text()


@pytest.mark.parametrize(('drift', 'equal'), [('0', True), ('0.0009', True), ('0.0011', False)])
def test_first_losses_come_out_again_within_a_thousandth(
    spec, says, monkeypatch, drift: str, equal: bool
) -> None:
    path = spec('seeds = [1]')
    says('run', path)
    monkeypatch.setenv('DRIFT', drift)
    said = says('check', path)
    expected = 'the first losses of 1 of 1 rows came out again\n'
    assert said == (expected if equal else 'error: 1 rows are stale: dense-seed1')
    assert 'only_first=True' in Path('calls').read_text().splitlines()[-1]


def test_what_a_check_refutes_is_left_out_until_it_is_run_again(spec, says, monkeypatch) -> None:
    path = spec()
    says('run', path)
    monkeypatch.setenv('DRIFT', '0.01')
    assert says('check', path, '--seeds', '2') == 'error: 1 rows are stale: dense-seed2'
    says('table', path)
    assert '`dense-seed2.json`: stale: loss ' in table()
    said = says('run', path)
    assert '1 of 2 runs are there already' in said
    says('table', path)
    assert 'stale' not in table()
    folders = {p.name.rpartition('-')[2] for p in Path('work_dirs/comparisons/spec').iterdir()}
    assert 'stale1' in folders
    assert '--resume' not in Path('calls').read_text()


def test_a_sample(spec, says) -> None:
    path = spec()
    says('run', path)
    assert says('check', path, '--sample', '1').startswith('the first losses of 1 of 1 rows')


def test_a_training_that_fails_refutes_nothing(spec, says, repository) -> None:
    path = spec('seeds = [1]')
    says('run', path)
    (repository / 'tools/train.py').write_text("import sys; sys.exit('error: no data')")
    assert says('check', path) == 'error: dense-seed1 cannot be repeated: error: no data'
    says('table', path)
    assert 'stale' not in table()


@pytest.mark.parametrize(
    ('now', 'equal', 'number'),
    [
        ([2.0, 2.001, 2.0], True, 2),
        ([2.0, 2.0, 2.003], False, 3),
        ([2.0, math.nan, 2.0], False, 2),
        ([math.nan, 2.0, 2.0], False, 1),
        ([2.0, 2.0, math.inf], False, 3),
    ],
)
def test_a_loss_that_is_no_number_never_came_out_again(now, equal: bool, number: int) -> None:
    found = compared(now, [2.0, 2.0, 2.0], 'dense-seed1')
    assert found['equal'] is equal
    assert found['finding'].startswith(f'loss {number} is ')
    # nor does one of a row that was no number in the first place
    assert not compared([2.0, math.nan], [2.0, math.nan], 'dense-seed1')['equal']


def test_another_number_of_losses_names_the_row() -> None:
    line = 'dense-seed1: its row has 3 first losses, today has 2'
    with pytest.raises(ValueError, match=line):
        compared([2.0, 2.0], [2.0, 2.0, 2.0], 'dense-seed1')


def test_a_table_says_which_of_its_rows_were_checked(spec, says, monkeypatch) -> None:
    path = spec(other='train_cfg.row=3')
    says('run', path)
    says('table', path)
    assert '- None of the 4 runs has been checked: `tools/compare.py check` does so.\n' in table()
    for commit, seed in (('one', '1'), ('two', '2')):
        monkeypatch.setattr(check, 'commit', lambda commit=commit: commit)
        says('check', path, '--rows', 'other', '--seeds', seed)
    says('check', path, '--rows', 'dense', '--seeds', '2')
    says('table', path)
    found = (
        'The first losses of 3 of 4 runs came out again when checked, at commits one (1), two (2).'
    )
    assert f'- {found} Not checked: dense (1).\n' in table()
    # a check of another training of the same name says nothing of this one
    row = ROWS / 'other-seed1.json'
    row.write_text(row.read_text().replace('"first_losses": [1.0', '"first_losses": [1.5'))
    says('table', path)
    assert '2 of 4 runs' in table() and 'Not checked: dense (1), other (1).' in table()
    monkeypatch.setenv('DRIFT', '0.01')
    says('check', path, '--rows', 'other', '--seeds', '2')
    says('table', path)
    assert '1 of 3 runs came out again when checked, at commit two (1). Not checked:' in table()
