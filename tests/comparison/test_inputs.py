"""Rows that have seen other data, or began with other weights, are not averaged with the rest."""

import json
from pathlib import Path
from typing import Any

import pytest

from vqmoe_vision.comparison.cli import compared
from vqmoe_vision.comparison.store import SPLITS

pytestmark = pytest.mark.usefixtures('tables_alone')
ROWS = Path('docs/results/rows/spec')
SCORES = {'dense': [10.0, 20.0, 30.0], 'same': [11.0, 20.0, 29.0]}
USUAL = {split: {'samples': 40_000, 'digest': f'usual {split}'} for split in SPLITS}


def table() -> str:
    return Path('docs/results/tables/spec.md').read_text()


def change(name: str, **fields: Any) -> None:
    path = ROWS / f'{name}.json'
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({n: v for n, v in content.items() if v is not None}))


@pytest.mark.parametrize('split', SPLITS)
def test_rows_of_other_data_are_listed_and_not_mixed_in(fill, says, split) -> None:
    path = fill(SCORES, dense={'data': USUAL}, same={'data': USUAL})
    change('same-seed1', data={**USUAL, split: {'samples': 40_000, 'digest': 'other'}})
    says('table', path)
    said = f'its {split} data are 40,000 samples (other), those of 5 others'
    assert f'- `same-seed1.json`: mixed: {said}' in table()
    assert '| 24.50 ' in table()  # of the two that are left
    assert 'Data: train 40,000 samples (usual train); val 40,000' in table()
    assert 'not recorded' not in table()
    # nor is it trained again: with the data that are here, that would end as it did
    assert '6 of 6 runs are there already' in says('run', path)


def test_rows_whose_data_were_not_recorded_count(fill, says) -> None:
    path = fill(SCORES)
    change('same-seed1', data=USUAL)
    change('same-seed2', data={'test': USUAL['test']})
    says('table', path)
    assert 'mixed' not in table() and '| 20.00 ' in table()
    assert 'Which data they saw is not recorded of 4 of 6 runs.' in table()


def test_rows_that_are_about_other_data_are_not_mixed(fill, says) -> None:
    """Such as those with a long tail, whose config says so."""
    tail = {**USUAL, 'train': {'samples': 900, 'digest': 'tail'}}
    option = "rows['same'] += ' train_dataloader.dataset.imbalance=100'"
    path = fill(SCORES, option, dense={'data': USUAL}, same={'data': tail})
    says('table', path)
    assert 'mixed' not in table() and 'stale' not in table()
    assert 'train 40,000 samples (usual train) and 900 samples (tail)' in table()


# The first row is what the others start from.
STARTED = {
    'dense': 'dense_1x',
    'one': 'dense_1x model.checkpoint={start}',
    'two': 'smoe model.checkpoint={start}',
    'three': 'dense_1x train_cfg.more=1 load_from={start}',
}


@pytest.fixture
def started(spec, says) -> str:
    """Rows that start from the dense one of their seed, whose runs are finished."""
    Path('first.py').write_text(Path(spec('seeds = [1, 2]')).read_text())
    path = spec("seeds = [1]\nstart = 'first.py dense iter_2.pth'\n", **STARTED)
    says('run', path)
    return path


def test_rows_that_began_with_other_weights_are_left_out(started: str, says) -> None:
    says('table', started)
    assert 'mixed' not in table()
    change('three-seed1', starting_weights={'load_from': 'other'})
    says('table', started)
    (line,) = [line for line in table().splitlines() if 'mixed' in line]
    assert line.startswith('- `three-seed1.json`: mixed: its starting weights are first/dense-')
    assert '/iter_2.pth (other), those of 2 others first/dense-seed1-' in line
    assert '4 of 4 runs are there already' in says('run', started)


def test_where_as_many_began_with_either_none_is_taken_for_the_right_ones(
    started: str, says
) -> None:
    change('one-seed1', starting_weights=None)
    change('two-seed1', starting_weights={'model.checkpoint': 'other'})
    says('table', started)
    lines = [line for line in table().splitlines() if 'mixed' in line]
    assert [line[3 : line.index('-seed1')] for line in lines] == ['two', 'three']


def test_a_check_does_not_take_other_weights_for_other_code(
    started: str, says, monkeypatch
) -> None:
    change('two-seed1', starting_weights={'model.checkpoint': 'lost'})
    change('one-seed1', starting_weights={'model.checkpoint': 'lost'})
    monkeypatch.setenv('DRIFT', '0.1')
    assert says('check', started, '--rows', 'one').endswith(': one-seed1')
    assert 'checked' not in json.loads((ROWS / 'one-seed1.json').read_text())


def test_a_refuted_row_is_left_out_until_it_is_trained_anew(spec, says, monkeypatch) -> None:
    path = spec()
    says('run', path)
    says('check', path, '--seeds', '1')
    with monkeypatch.context() as elsewhere:  # a machine that rounds otherwise
        elsewhere.setenv('DRIFT', '0.01')
        assert (
            says('check', path, '--seeds', '2')
            == 'error: 1 rows did not come out again: dense-seed2'
        )
    says('table', path)
    assert '`dense-seed2.json`: stale: loss ' in table()
    Path('calls').unlink()
    assert '1 of 2 runs are there already' in says('run', path)
    (call,) = Path('calls').read_text().splitlines()
    assert '--resume' not in call
    assert len(list(Path('work_dirs/comparisons/spec').glob('dense-seed2-*-stale1'))) == 1
    says('table', path)
    assert 'stale' not in table()
    assert 'The first losses of 1 of 2 runs came out again, at ' in table()
    assert 'Not checked: dense-seed2.' in table()
    assert '2 of 2 runs are there already' in says('run', path)


def test_a_training_that_fails_refutes_nothing_and_loses_no_other(
    spec, says, repository, capsys
) -> None:
    path = spec('seeds = [1]', other='train_cfg.row=3')
    says('run', path)
    train = (repository / 'tools/train.py').read_text()
    fails = "import sys\nif 'train_cfg.row=3' not in sys.argv: sys.exit('error: no data')\n"
    (repository / 'tools/train.py').write_text(fails + train)
    assert says('check', path) == 'error: 1 rows did not come out again: dense-seed1'
    said = capsys.readouterr().out.splitlines()
    assert said == [
        'dense-seed1 cannot be repeated: error: no data',
        'the first losses of 1 of 2 rows came out again',
    ]
    says('table', path)
    assert 'stale' not in table()


@pytest.mark.parametrize(
    ('now', 'equal', 'number'),
    [
        ([2.0, 2.001, 2.0], True, 2),
        ([2.0, 2.0, 2.003], False, 3),
        ([2.0, float('nan'), 2.0], False, 2),
        ([2.0, 2.0, float('inf')], False, 3),
    ],
)
def test_a_loss_that_is_no_number_never_came_out_again(now, equal: bool, number: int) -> None:
    found = compared(now, [2.0, 2.0, 2.0])
    assert found['equal'] is equal
    assert found['finding'].startswith(f'loss {number} is ')
    # nor does one of a row that was no number in the first place
    assert not compared([2.0, float('nan')], [2.0, float('nan')])['equal']
