"""Rows that have seen other data are not averaged with the others."""

import json
from pathlib import Path
from typing import Any

import pytest

from vqmoe_vision.comparison import cli
from vqmoe_vision.comparison.data import SPLITS

ROWS = Path('docs/results/rows/spec')
SCORES = {'dense': [10.0, 20.0, 30.0], 'same': [11.0, 20.0, 29.0]}
USUAL = {split: {'samples': 40_000, 'digest': f'usual {split}'} for split in SPLITS}


@pytest.fixture(autouse=True)
def tables_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, 'draw_figures', lambda *made: [])


def table() -> str:
    return Path('docs/results/tables/spec.md').read_text()


def change(name: str, **fields: Any) -> None:
    path = ROWS / f'{name}.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize(
    ('other', 'said'),
    [
        ({'samples': 45_000, 'digest': 'other'}, '45,000 samples (other)'),
        ({'samples': 40_000, 'digest': 'other'}, '40,000 samples (other)'),
    ],
)
def test_rows_of_other_data_are_listed_and_not_mixed_in(fill, says, split, other, said) -> None:
    path = fill(SCORES, dense={'data': USUAL}, same={'data': USUAL})
    change('same-seed1', data={**USUAL, split: other})
    says('table', path)
    assert f'- `same-seed1.json`: mixed: its {split} data are {said}, those of 5 others' in table()
    assert '| 24.50 ' in table()  # of the two that are left
    assert 'Data: train 40,000 samples (usual train); val 40,000' in table()
    assert 'Not recorded' not in table()
    # nor is it trained again: with the data that are here, that would end as it did
    assert '6 of 6 runs are there already' in says('run', path)
    # of a part, too, most is most of the whole
    assert says('list', path, '--rows', 'same', '--seeds', '1') == ''
    says('table', path, '--rows', 'same', '--seeds', '1', '2')
    assert '`same-seed1.json`: mixed: ' in Path('docs/results/tables/spec-part.md').read_text()


def test_rows_from_before_data_were_recorded_count(fill, says) -> None:
    path = fill(SCORES)
    says('table', path)
    assert '- Which data the runs have seen is not recorded' in table()
    change('same-seed1', data=USUAL)
    change('same-seed2', data={'test': USUAL['test']})  # trained before, tested since
    says('table', path)
    assert 'mixed' not in table() and '| 20.00 ' in table()
    assert 'test 40,000 samples (usual test). Not recorded of 4 of 6 runs.' in table()


def test_rows_that_are_about_other_data_are_not_mixed(fill, says) -> None:
    """Such as those with a long tail, whose config says so."""
    path = fill(SCORES, dense={'data': USUAL}, same={'data': USUAL})
    text = Path(path).read_text()
    Path(path).write_text(
        text.replace('row=same', 'row=same train_dataloader.dataset.imbalance=100')
    )
    tail = {**USUAL, 'train': {'samples': 900, 'digest': 'tail'}}
    for seed in (1, 2, 3):
        content = json.loads((ROWS / f'same-seed{seed}.json').read_text())
        content['config']['train_dataloader'] = {'dataset': {'imbalance': 100}}
        change(f'same-seed{seed}', data=tail, config=content['config'])
    says('table', path)
    assert 'mixed' not in table() and 'stale' not in table()
    assert 'train 40,000 samples (usual train) and 900 samples (tail)' in table()
