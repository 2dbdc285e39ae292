"""Rows that today's code does not repeat are stale."""

from pathlib import Path

import pytest

from vqmoe_vision.comparison.check import compared


def table() -> str:
    return Path('docs/results/tables/spec.md').read_text()


def test_a_refuted_row_is_left_out_until_it_is_trained_anew(spec, says, monkeypatch) -> None:
    path = spec()
    says('run', path)
    says('check', path, '--seeds', '1')
    with monkeypatch.context() as elsewhere:  # a machine that rounds otherwise
        elsewhere.setenv('DRIFT', '0.01')
        assert says('check', path, '--seeds', '2') == 'error: 1 rows are stale: dense-seed2'
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
    assert says('check', path) == 'error: 1 rows cannot be repeated: dense-seed1'
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
