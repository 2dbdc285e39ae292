"""Choices are made on held-out data: stage 'dev' tests nothing."""

import json
from pathlib import Path

import pytest

from vqmoe_vision.comparison import cli

ROWS = Path('docs/results/rows/spec')
DEV = "stage = 'dev'"


@pytest.fixture(autouse=True)
def no_test_is_made(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / 'tools/test.py').write_text("import sys; sys.exit('error: it was tested')")
    monkeypatch.setattr(cli, 'draw_figures', lambda *made: [])


def test_the_score_is_that_of_the_last_validation(spec, says) -> None:
    path = spec(DEV, other='train_cfg.row=3')
    says('run', path)
    rows = [json.loads(file.read_text()) for file in sorted(ROWS.glob('*.json'))]
    assert [row['row'] for row in rows] == ['dense', 'dense', 'other', 'other']
    assert all(row['stage'] == 'dev' for row in rows)
    assert rows[0]['test'] == {'mIoU': 2.0, 'blocks.1.mlp/load_unused': 1.0}
    says('table', path)
    shown = Path('docs/results/tables/spec.md').read_text()
    assert 'mIoU at the end of training on held-out data; no test data was seen.' in shown
    assert 'the same on held-out images' not in shown  # they are these
    assert '4 of 4 runs are there already' in says('run', path)


def test_a_training_that_does_not_end_with_a_validation(spec, says, repository, capsys) -> None:
    train = (repository / 'tools/train.py').read_text()
    (repository / 'tools/train.py').write_text(train.replace('iterations=2', 'iterations=3'))
    assert says('run', spec(DEV), '--seeds', '1') == 'error: 1 of 1 runs failed: dense-seed1'
    said = capsys.readouterr().out
    assert 'dense-seed1: held_out=2 ' in said and 'after 3 iterations' in said


def test_rows_of_one_stage_are_not_those_of_the_other(fill, says) -> None:
    path = Path(fill({'dense': [1.0, 2.0]}))
    says('table', str(path))
    path.write_text(path.read_text() + f'\n{DEV}\n')
    line = says('table', str(path))
    assert "dense-seed1.json: it is of stage='test', not of 'dev'" in line


def test_nothing_is_measured_on_test_images(spec, says) -> None:
    path = spec(DEV)
    says('run', path)
    assert says('shifts', path) == 'error: spec.py: shifts names none'
    assert says('routing', path) == (
        "error: spec.py: routing is measured on test data, which stage='dev' spares"
    )
