"""What may be said of rows: by how many seeds, among how many rows, and beside which controls."""

import json
import math
from pathlib import Path

import pytest

from vqmoe_vision.comparison.controls import challengers
from vqmoe_vision.comparison.outcome import Outcome
from vqmoe_vision.comparison.results import images_seen
from vqmoe_vision.comparison.rows import FEATURE_ROWS, ROWS
from vqmoe_vision.comparison.runs import Run
from vqmoe_vision.comparison.sentences import verdict
from vqmoe_vision.comparison.spec import read_comparison
from vqmoe_vision.comparison.statistics import Difference, paired_difference, pairs_needed
from vqmoe_vision.comparison.store import Store

pytestmark = pytest.mark.usefixtures('tables_alone')
TABLES = Path('docs/results/tables')
SCORES = {'dense': [10.0, 20.0, 30.0], 'better': [11.0, 22.0, 33.0], 'same': [11.0, 20.0, 29.0]}


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in TABLES.iterdir()}


@pytest.mark.parametrize(
    ('by_epoch', 'drop_last', 'iterations', 'images'),
    [
        # ten images in batches of four, of which the third holds two: 4 + 4 + 2, 4
        (True, False, 4, 14),
        (True, False, 6, 20),
        (True, True, 6, 24),  # 4 + 4 an epoch
        (False, False, 6, 24),  # a sampler that goes on fills the batch
    ],
)
def test_images_seen(by_epoch: bool, drop_last: bool, iterations: int, images: int) -> None:
    loader = dict(batch_size=4, drop_last=drop_last)
    config = dict(train_cfg=dict(by_epoch=by_epoch), train_dataloader=loader)
    content = dict(config=config, iterations=iterations, data=dict(train=dict(samples=10)))
    assert images_seen(content) == images == images_seen({**content, 'iterations': 9}, iterations)


def difference(*each: float) -> Difference:
    return paired_difference(dict(enumerate(each)), dict.fromkeys(range(len(each)), 0.0))


def test_sentences_by_hand() -> None:
    # two standard deviations need 5 pairs for 80 % power at 5 %
    two = difference(1, 2, 3)
    open_ = verdict('a', 'b', two, 0.074, 1, 3)
    assert open_.startswith('a and b cannot be told apart at this budget (+2.00, 95 % interval')
    assert open_.endswith('about 2 more would tell one of 2.00.')
    # among ten rows the same difference has to stand a level of 0.5 %
    assert pairs_needed(1.0, 2.0, 0.005) == 8
    among_ten = verdict('a', 'b', two, 0.74, 10, 3)
    assert among_ten.endswith('about 5 more would tell one of 2.00.')
    told = verdict('a', 'b', difference(-2.5, -2, -1.5, -2, -2), 0.004, 4, 5)
    assert told.startswith('a is worse than b at this budget: -2.00') and 'p = 0.004' in told
    lone = verdict('a', 'b', difference(2), math.nan, 1, 1)
    assert 'nothing can be said' in lone
    assert 'more than a thousand' in verdict('a', 'b', difference(-1, 0, 1), 1, 1, 3)
    assert 'by exactly +2.00' in verdict('a', 'b', difference(2, 2, 2), math.nan, 1, 3)


@pytest.mark.parametrize('each', [(2.0, 2.1, 2.2), (2.0, 2.0, 2.0), (-1.0, 0.0, 1.0)])
def test_nothing_is_decided_before_the_last_seed(each: tuple[float, ...]) -> None:
    said = verdict('a', 'b', difference(*each), 0.001, 1, 5)
    assert said.startswith('a and b, not finished: 3 of 5 seeds; so far ')
    assert said.endswith('no verdict.')


# the first row of SCORES is the reference; 'sure' is better whatever it is corrected for
SURE = {'dense': [10.0, 20.0, 30.0], 'sure': [12.0, 22.001, 32.0], 'near': [11.0, 21.1, 31.3]}


def test_rows_that_are_not_finished_count_for_the_correction_and_get_no_verdict(fill, says):
    """Each further row that is planned makes p larger, though none of them has a result."""
    says('table', fill(SURE))
    p = json.loads((TABLES / 'spec.json').read_text())['rows'][2]['p']
    assert p < 0.05 / 2
    assert 'near is better than dense' in (TABLES / 'spec.md').read_text()
    plan = Path('spec.py').read_text()
    more = ', '.join(f"more{n}='train_cfg.row=more{n}'" for n in range(20))
    Path('spec.py').write_text(f'{plan}\nrows |= dict({more})')
    says('table', 'spec.py')
    shown = (TABLES / 'spec.md').read_text()
    assert 'corrected for all 22 rows' in shown
    # sure is first and gets 22, near 21
    assert json.loads((TABLES / 'spec.json').read_text())['rows'][2]['p_holm'] == pytest.approx(
        21 * p
    )
    assert 'sure is better than dense' in shown and 'near and dense cannot be told apart' in shown
    Path('spec.py').write_text(f'{plan}\nseeds = [1, 2, 3, 4]')
    says('table', 'spec.py')
    shown = (TABLES / 'spec.md').read_text()
    assert 'is better' not in shown
    assert 'sure and dense, not finished: 3 of 4 seeds; so far +2.00 (95 % interval' in shown
    line = next(line for line in shown.splitlines() if line.startswith('| sure'))
    cells = [cell.strip() for cell in line.split('|')]
    assert cells[4] == '3 of 4' and cells[5].startswith('+2.00 (') and cells[6] == '-'


def test_an_early_p_makes_that_of_no_finished_row_smaller(fill, says) -> None:
    """Two pairs that nearly agree have a tiny p, which the end need not keep."""
    dense, near = [10.0, 20.0, 30.0, 40.0, 50.0], [11.0, 21.3, 30.5, 41.9, 50.2]
    path = fill({'dense': dense, 'near': near, 'early': [11.0, 21.0001]})
    says('table', path)
    found = json.loads((TABLES / 'spec.json').read_text())
    rows = {row['row']: row for row in found['rows']}
    assert rows['early']['p'] < 1e-3 and rows['early']['p_holm'] is None
    assert rows['near']['p_holm'] == pytest.approx(2 * rows['near']['p'])
    assert 'near and dense cannot be told apart' in found['sentences'][0]


def test_an_early_p_against_a_control_counts_for_no_finished_row(fill) -> None:
    plan = (
        "rows = {row: f'smoe train_cfg.row={row}' for row in ('near', 'early')}\n"
        "rows['dense'] = 'smoe_frozen'\ncontrols = ['dense']"
    )
    path = fill({'dense': [10.0, 20.0, 30.0], 'near': [11.0, 21.1, 31.3], 'early': [1.0]}, plan)
    comparison = read_comparison(path)
    runs = [Run(comparison, *which, Path('work')) for which in comparison.selected()]
    results = Store(Path('docs/results/rows/spec')).read(runs)
    early = {**results.usable['dense', 1], 'row': 'early'}
    for seed, score in ((1, 11.0), (2, 21.0001)):
        results.usable['early', seed] = {**early, 'seed': seed, 'test': {'mIoU': score}}
    found, corrected = Outcome(comparison, results).against('dense')
    assert found['early'].p < found['near'].p and math.isnan(corrected['early'])
    assert corrected['near'] == pytest.approx(2 * found['near'].p)


@pytest.mark.parametrize(
    ('part', 'which'),
    [
        (['--rows', 'near'], 'rows dense, near; seeds 1, 2, 3.'),
        (['--rows', 'near', 'dense'], 'rows dense, near; seeds 1, 2, 3.'),
        (['--seeds', '3', '1'], 'rows dense, sure, near, last; seeds 3, 1.'),
    ],
)
def test_a_part_is_corrected_for_all_and_leaves_the_whole_alone(fill, says, part, which) -> None:
    says('table', fill({**SURE, 'last': [10.0, 20.3, 31.0]}))
    first = files()
    whole = json.loads((TABLES / 'spec.json').read_text())
    says('table', 'spec.py', *part)
    assert {name: content for name, content in files().items() if 'part' not in name} == first
    shown = (TABLES / 'spec-part.md').read_text()
    assert shown.startswith('# spec, a part\n')
    assert f'- A part of spec: {which}\n' in shown
    found = json.loads((TABLES / 'spec-part.json').read_text())
    if '--seeds' in part:
        assert 'p_holm' in found['rows'][1] and 'is better' not in shown
        assert 'sure and dense: +2.00 (95 %' in shown and 'by the 2 of 3 seeds shown' in shown
        return
    assert [row['row'] for row in found['rows']] == ['dense', 'near']
    assert found['scores'].keys() == {'dense', 'near'}
    assert found['rows'] == [whole['rows'][0], whole['rows'][2]]
    assert found['sentences'] == [said for said in whole['sentences'] if said.startswith('near')]


def test_all_rows_and_seeds_by_name_are_the_whole(fill, says) -> None:
    says('table', fill(SCORES), '--rows', 'same', 'dense', 'better', '--seeds', '3', '2', '1')
    assert files().keys() == {f'spec.{kind}' for kind in ('md', 'tex', 'csv', 'json')}


def test_another_reference_is_that_of_a_comparison_of_its_own(fill, says) -> None:
    """And a second look, which a reader is told of, beside the files of the planned one."""
    path = fill(SCORES)
    says('table', path)
    planned = files()
    says('table', path, '--reference', 'same')
    made = {name: content for name, content in files().items() if name not in planned}
    assert all(name.startswith('spec-reference-same') for name in made)
    assert files().items() >= planned.items()
    shown = (TABLES / 'spec-reference-same.md').read_text()
    assert shown.startswith('# spec, differences to same\n')
    assert 'differences are to same, where dense is the reference that the comparison' in shown
    assert '```' not in shown  # commands, which the planned table has
    assert shown.endswith('are the same for any reference: spec.md has them.\n')
    found = json.loads((TABLES / 'spec-reference-same.json').read_text())
    # better less same is 0, 2, 4, dense less same -1, 0, 1
    differences = {row['row']: row['difference'] for row in found['rows']}
    assert differences == {'dense': 0, 'better': 2, 'same': None}

    with Path(path).open('a') as file:
        file.write("reference = 'same'\n")
    says('table', path)
    own = json.loads((TABLES / 'spec.json').read_text())
    assert {key: own[key] for key in ('rows', 'sentences')} == {
        key: found[key] for key in ('rows', 'sentences')
    }


def test_the_own_reference_is_no_second_look(fill, says) -> None:
    says('table', fill(SCORES))
    first = files()
    says('table', 'spec.py', '--reference', 'dense')
    assert files() == first


def test_a_reference_that_does_not_exist(fill, says) -> None:
    said = says('table', fill(SCORES), '--reference', 'nobody')
    assert said == 'error: --reference nobody does not exist; there are dense, better, same'


def test_a_part_from_another_row(fill, says) -> None:
    says('table', fill(SCORES), '--reference', 'same', '--rows', 'better')
    shown = (TABLES / 'spec-reference-same-part.md').read_text()
    assert shown.startswith('# spec, differences to same, a part\n')
    assert 'A part of spec: rows better, same;' in shown


def test_figures_of_a_part_have_names_of_their_own(fill, says) -> None:
    says('table', fill(SCORES), '--rows', 'same')
    assert {'spec-part-curves.png', 'spec-part-differences.pdf'} < files().keys()
    assert all(name.startswith('spec-part') for name in files())


def test_a_figure_that_cannot_be_drawn_any_more_is_removed(fill, says) -> None:
    """It would show rows that the new table leaves out."""
    path = fill({'dense': [10.0, 20.0], 'better': [12.0, 21.0]})
    says('table', path)
    assert {'spec-differences.png', 'spec-differences.pdf', 'spec-curves.png'} <= files().keys()
    for row in Path('docs/results/rows/spec').glob('better-*'):
        row.write_text('damaged')
    says('table', path)
    assert not any('differences' in name for name in files()) and 'spec-curves.png' in files()


def test_figures_that_depend_on_no_reference_are_drawn_once(fill, says) -> None:
    says('table', fill(SCORES), '--reference', 'same')
    figures = {name for name in files() if name.endswith('.png')}
    assert figures == {'spec-reference-same-differences.png'}


# two seeds; the first row is the reference
SCREENED = {
    'dense': [10.0, 20.0],
    'far': [90.0, 99.0],
    'agrees': [10.3, 20.3],
    'near': [12.0, 20.0],
    'twin': [10.0, 20.0],
}


def test_two_seeds_are_tested_with_the_noise_of_all_rows(fill, says) -> None:
    """Each row alone would be hidden by its own two seeds, or agree by chance."""
    path = fill(SCREENED)
    says('table', path)
    found = json.loads((TABLES / 'spec.json').read_text())
    far, agrees, near, twin = found['sentences']
    assert far.startswith('far stands out above dense at this budget: +79.50') and 'p = ' in far
    assert agrees.startswith('agrees and dense cannot be told apart at this budget (+0.30, 95 % ')
    assert near.startswith('near and dense cannot') and '2 seeds, by the noise of all rows' in near
    assert twin == 'twin and dense differ by exactly +0.00 at each of 2 seeds.'
    assert 'with the noise of all rows that are finished' in found['notes'][0]
    assert {row['freedom'] for row in found['rows'][1:4]} == {3}  # of four that differ
    assert len({row['noise'] for row in found['rows'][1:4]}) == 1
    # with a third seed to come nothing is decided, and later each has its own noise
    with Path(path).open('a') as file:
        file.write('\nseeds = [1, 2, 3]')
    says('table', path)
    found = json.loads((TABLES / 'spec.json').read_text())
    assert all('not finished: 2 of 3 seeds' in said for said in found['sentences'])
    assert 'those of the paired t-test' in found['notes'][0]


def test_two_seeds_of_two_rows_have_no_verdict(fill, says) -> None:
    says('table', fill({'dense': [10.0, 20.0], 'near': [11.0, 21.001], 'early': [3.0]}))
    found = json.loads((TABLES / 'spec.json').read_text())
    assert found['rows'][1]['p'] < 1e-3
    assert found['sentences'][0].startswith('near and dense differ by +1.00 over 2 seeds')
    assert found['sentences'][0].endswith('no other row tells their noise: no verdict.')
    assert '1 degree of freedom' in found['notes'][0]


def test_a_part_has_the_noise_of_the_whole(fill, says) -> None:
    path = fill(SCREENED, "shifts = {'fog': 'model.fog=1'}")
    for file in Path('docs/results/rows/spec').glob('*-seed?.json'):
        content = json.loads(file.read_text())
        content['shifts'] = {'fog': {'model.fog=1': 2 * content['test']['mIoU']}}
        file.write_text(json.dumps(content))
    says('table', path)
    says('table', path, '--rows', 'near')
    whole, part = ((TABLES / f'{name}.md').read_text() for name in ('spec', 'spec-part'))
    shown = [line for line in part.splitlines() if line.startswith(('| near', '| fog'))]
    assert len(shown) == 3  # of the part, and under fog the reference and the row
    cells = [line.split('|') for line in whole.splitlines()]
    kept = [[cell.strip() for cell in line] for line in cells]
    for line in shown:
        assert [cell.strip() for cell in line.split('|')] in kept


CONTROLLED = {
    'dense': [1.0, 2.0, 3.0],
    'smoe_frozen': [5.0, 6.0, 7.0],
    'hashmoe': [5.0, 6.0, 7.0],
    'smoe': [5.0, 6.0, 7.1],
    'vqmoe': [8.0, 9.1, 10.0],
    'hashmoe_paper': [1.0, 2.0, 3.1],
}
PLAN = f"""
rows = {{row: f'{{row}} train_cfg.row={{row}}' for row in {list(CONTROLLED)}}}
controls = ['smoe_frozen', 'hashmoe']
"""


@pytest.mark.parametrize('reference', ['dense', 'smoe'])
def test_a_router_that_does_not_beat_a_control_is_named(fill, says, reference: str) -> None:
    """Those alone that have one to learn, the reference among them."""
    path = fill(CONTROLLED, f"{PLAN}\nreference = '{reference}'")
    says('table', path)
    said = json.loads((TABLES / 'spec.json').read_text())['sentences']
    found = [line for line in said if 'the control' in line]
    assert found == [
        f'smoe does not beat the control {control}: +0.03, 95 % interval -0.11 to +0.18, 3 seeds.'
        for control in ('smoe_frozen', 'hashmoe')
    ]
    with Path(path).open('a') as file:
        file.write('\nseeds = [1, 2, 3, 4]')
    says('table', path)
    said = json.loads((TABLES / 'spec.json').read_text())['sentences']
    found = [line for line in said if 'the control' in line]
    assert len(found) == 4 and all('not finished: 3 of 4 seeds' in line for line in found)


def test_seeds_that_are_not_shown_are_not_called_unfinished(fill, says) -> None:
    says('table', fill(CONTROLLED, PLAN), '--seeds', '1', '3')
    said = json.loads((TABLES / 'spec-part.json').read_text())['sentences']
    assert all('by the 2 of 3 seeds shown, no verdict.' in line for line in said)
    next(Path('docs/results/rows/spec').glob('smoe-seed3.json')).unlink()
    says('table', 'spec.py', '--seeds', '2', '3', '--rows', 'smoe', 'vqmoe')
    said = json.loads((TABLES / 'spec-part.json').read_text())['sentences']
    assert said[0].startswith('smoe and dense have one seed in common')
    assert said[1].startswith('vqmoe and dense: +7.05 (95 %')


def test_a_control_that_is_the_reference_is_spoken_of_once(fill, says) -> None:
    says('table', fill(CONTROLLED, PLAN), '--reference', 'hashmoe')
    said = json.loads((TABLES / 'spec-reference-hashmoe.json').read_text())['sentences']
    assert sum(line.startswith('smoe ') and 'hashmoe' in line for line in said) == 1
    assert [line for line in said if 'the control' in line] == [
        'smoe does not beat the control smoe_frozen: +0.03, 95 % interval -0.11 to +0.18, 3 seeds.'
    ]


def test_a_router_that_differs_from_a_control_by_the_same_at_all_seeds(fill, says) -> None:
    scores = {**CONTROLLED, 'smoe': [6.0, 7.0, 8.0], 'vqmoe': [5.0, 6.0, 7.0]}
    says('table', fill(scores, PLAN))
    said = json.loads((TABLES / 'spec.json').read_text())['sentences']
    assert [line for line in said if 'the control' in line] == [
        f'{row} and the control {control} differ by exactly {by} at each of 3 seeds.'
        for control in ('smoe_frozen', 'hashmoe')
        for row, by in (('smoe', '+1.00'), ('vqmoe', '+0.00'))
    ]


def test_two_seeds_against_a_control_are_tested_with_the_noise_of_all_rows(fill, says) -> None:
    scores = {row: values[:2] for row, values in CONTROLLED.items()}
    says('table', fill({**scores, 'smoe': [6.0, 7.001], 'vqmoe': [9.0, 8.0]}, PLAN))
    said = json.loads((TABLES / 'spec.json').read_text())['sentences']
    # less the control they are 1, 1.001 and 4, 2: smoe alone has p below 0.001
    assert sum(line.startswith('smoe does not beat the control') for line in said) == 2


def test_a_control_is_there_for_rows_that_begin_as_it_does(spec) -> None:
    spec()
    Path('first.py').write_text(Path('spec.py').read_text())
    comparison = read_comparison(
        spec(
            "start = 'first.py dense iter_2.pth'\nall_methods = True\nall_started = True\n"
            "rows = dict(smoe_frozen='smoe_frozen', frozen='smoe_frozen', codes='vqmoe_official',"
            "by_chance='vqmoe model.moe.form=continuous model.moe.train_router=False "
            "model.moe.balance_weight=0')\n"
            "controls = ['smoe_frozen', 'hashmoe_started']",
        )
    )
    learned = {row for row in (*ROWS, *FEATURE_ROWS) if 'dense' not in row} - {'hashmoe'}
    # codes are learned beside a frozen router
    assert set(challengers(comparison, 'smoe_frozen')) == learned | {'codes'}
    started = {f'{row}_started' for row in learned}
    assert set(challengers(comparison, 'hashmoe_started')) == started
