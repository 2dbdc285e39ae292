"""Rows lose nothing to who else writes, and a damaged file is one file less."""

import csv
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vqmoe_vision.comparison import spec as spec_module
from vqmoe_vision.comparison.cli import compared
from vqmoe_vision.comparison.queue import Queue, Task
from vqmoe_vision.comparison.spec import canonical, read_comparison, recipe_of
from vqmoe_vision.comparison.store import SPLITS, Run, Store
from vqmoe_vision.moe import METHODS

from .. import cases
from .conftest import ROWS, change, table

pytestmark = pytest.mark.usefixtures('tables_alone')
WORK = Path('work_dirs/comparisons')
SCORES = {'dense': [10.0, 20.0, 30.0], 'same': [11.0, 20.0, 29.0]}


@pytest.fixture
def finished(spec, says) -> list[Run]:
    says('run', path := spec())
    comparison = read_comparison(path)
    return [Run(comparison, *which, WORK) for which in comparison.selected()]


def row(run: Run) -> dict[str, Any]:
    return json.loads((ROWS / f'{run.name}.json').read_text())


def test_another_queue_leaves_what_was_measured_meanwhile(finished):
    """It took the runs up before they were finished, and comes to them when they are."""
    store = Store(ROWS)
    store.add(finished[0], shifts={'fog': {'a': 1.0}})
    assert Queue([Task(run, store) for run in finished], 1, WORK / 'PAUSE').work() == []
    assert len(Path('calls').read_text().splitlines()) == 2
    assert row(finished[0])['shifts'] == {'fog': {'a': 1.0}}


def test_many_writers_at_the_same_moment(finished):
    run, names = finished[0], {str(number) for number in range(16)}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: Store(ROWS).add(run, shifts={n: {n: 1.0}}), names))
    assert row(run)['shifts'].keys() == names
    assert {path.name for path in ROWS.iterdir()} == {f'{run.name}.json' for run in finished}


def having(**changes: Any) -> Callable[[str], str]:
    def harm(text: str) -> str:
        content = {**json.loads(text), **changes}
        return json.dumps({n: v for n, v in content.items() if v is not None})

    return harm


@cases(
    'harm, said',
    *((having(**{name: None}), name) for name in ('row', 'test', 'held_out')),
    (having(test={'mIoU': math.nan}), 'test'),
    (having(test={'mAcc': 3.0}), 'test'),
    (having(version=1), 'version 1'),
    (having(seed=3), 'seed=3'),
    (having(metric='mAcc'), "metric='mAcc'"),
    (having(stage='dev'), "stage='dev'"),
    (lambda text: '<<<<<<< HEAD', 'Expecting value'),
    *((having(**{name: 'long'}), name) for name in ('minutes', 'macs', 'test', 'data', 'checked')),
    (having(seed=1.5), 'seed'),
    (having(test={'mIoU': 3.0, 'mAcc': [1]}), 'test'),
    (having(training_loss=[[1, 2.0, 3]]), 'training_loss'),
    (having(data={'test': {'digest': None}}), 'samples'),
    (having(starting_weights={'model.start': 'a' * 16}), 'model.start'),  # of another config
    (lambda text: '[' * 10_000, 'recursion'),
    (lambda text: '[]', 'version None'),
)
def test_a_damaged_row_is_left_out_alone(fill, says, harm, said):
    path = fill(SCORES)
    damaged = ROWS / 'same-seed1.json'
    damaged.write_text(harm(damaged.read_text()))
    says('table', path)
    (line,) = [line for line in table().splitlines() if line.startswith('- `same-seed1.json`: ')]
    assert said in line and '| 24.50 ' in table()  # of the seeds that are left


@cases(
    'changes',
    {'data': []},
    {'test': {'mIoU': 3.0}, 'seed': '1'},
    {'checked': 'x'},
    {'metric': []},
)
def test_a_damaged_row_of_another_comparison_stops_no_table(fill, says, changes):
    path = fill(SCORES)
    fields = {**json.loads((ROWS / 'same-seed1.json').read_text()), **changes}
    for seed in (1, 2):
        file = ROWS.parent / f'other/same-seed{seed}.json'
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(fields))
    assert says('table', path).startswith('docs/results/tables/spec.md')


def test_rows_put_no_markup_and_no_formula_into_tables(fill, says):
    path, tag = fill(SCORES), '<img src=x>|`\n# A'
    for name in ('dense-seed1', 'same-seed1'):
        data = {'test': {'samples': 9, 'digest': tag}}
        checked = {'equal': True, 'commit': f'{tag}2'}
        routing = {'images': 5, 'changes': [{}], 'shifts': {'flip': {}, 'fog 3': {}}}
        routing['layers'] = {'blocks.1.mlp': {f'{tag}3/load_entropy': 1.0}}
        fields = {'commit': '=1+1', 'hardware': f'@{tag}{{\\', 'data': data, 'routing': routing}
        change(name, checked=checked, **fields)
    change('same-seed2', recipe=f'{tag}\x1b[31m')
    (ROWS / '`<u>`-seed7.json').write_text('{}')
    assert says('table', path).startswith('docs/results/tables/spec.md')
    texts = {s: Path(f'docs/results/tables/spec.{s}').read_text() for s in ('md', 'tex')}
    assert '<img' not in ''.join(texts.values()) and '\x1b' not in ''.join(texts.values())
    assert texts['md'].count('&lt;img src=x&gt;&#124;&#96;&#92;n# A') == 6
    assert "`'<u>'-seed7.json`" in texts['md']  # as code, which ends nowhere earlier
    (line, *_) = csv.DictReader(Path('docs/results/tables/spec.csv').read_text().splitlines())
    assert line['commit'] == "'=1+1, abc" and line['hardware'].startswith("'@<img src=x>|`\\n# A")


def test_what_routing_lacks_is_said_with_the_name_of_the_file(fill, says):
    path = fill(SCORES)
    layers = {'blocks.1.mlp': {'router/load_entropy': 1.0}}
    change('same-seed2', routing={'images': 5, 'layers': layers, 'changes': []})
    error = says('table', path)
    assert error.startswith('error: same-seed2.json is damaged: ') and 'shifts' in error


def test_a_damaged_record_of_a_run_loses_no_other(finished, says, capsys):
    for run in finished:
        (ROWS / f'{run.name}.json').unlink()
    (finished[0].folder / 'run.json').write_text('{"first_losses": 3}')
    assert says('run', 'spec.py') == 'error: 1 of 2 runs failed: dense-seed1'
    assert [path.name for path in ROWS.iterdir()] == ['dense-seed2.json']
    said = capsys.readouterr().out
    assert 'dense-seed1 failed: ' in said and str(finished[0].folder) in said


def test_of_stage_dev_the_score_is_that_of_the_last_validation(repository, spec, says, capsys):
    (repository / 'tools/test.py').write_text("import sys; sys.exit('error: it was tested')")
    path = spec("stage = 'dev'", other='train_cfg.row=3')
    says('run', path, '--rows', 'dense')
    rows = [json.loads(file.read_text()) for file in sorted(ROWS.glob('*.json'))]
    assert [(row['row'], row['stage']) for row in rows] == [('dense', 'dev')] * 2
    assert rows[0]['test'] == {'mIoU': 2.0, 'blocks.1.mlp/load_unused': 1.0}
    says('table', path)
    assert 'mIoU at the end of training on held-out data; no test data was seen.' in table()
    assert 'the same on held-out images' not in table()  # they are these
    assert says('shifts', path) == 'error: spec.py: shifts names none'
    assert "routing is measured on test data, which stage='dev' spares" in says('routing', path)
    train = (repository / 'tools/train.py').read_text()
    (repository / 'tools/train.py').write_text(train.replace('iterations=2', 'iterations=3'))
    assert says('run', path, '--seeds', '1') == 'error: 1 of 1 runs failed: other-seed1'
    said = capsys.readouterr().out
    assert 'other-seed1: held_out=2 ' in said and 'after 3 iterations' in said


USUAL = {split: {'samples': 40_000, 'digest': f'usual {split}'} for split in SPLITS}


@pytest.mark.parametrize('split', SPLITS)
def test_rows_of_other_data_are_listed_and_not_mixed_in(fill, says, split):
    path = fill(SCORES, dense={'data': USUAL}, same={'data': USUAL})
    change('same-seed1', data={**USUAL, split: {'samples': 40_000, 'digest': 'other'}})
    says('table', path)
    said = f'its {split} data are 40,000 samples (other), those of 5 others'
    assert f'- `same-seed1.json`: mixed: {said}' in table()
    assert '| 24.50 ' in table() and 'not recorded' not in table()  # of the two that are left
    assert 'Data: train 40,000 samples (usual train); val 40,000' in table()
    # nor is it trained again: with the data that are here, that would end as it did
    assert '6 of 6 runs are there already' in says('run', path)


def test_rows_whose_data_were_not_recorded_count(fill, says):
    path = fill(SCORES)
    change('same-seed1', data=USUAL)
    change('same-seed2', data={'test': USUAL['test']})
    says('table', path)
    assert 'mixed' not in table() and '| 20.00 ' in table()
    assert 'Which data they saw is not recorded of 4 of 6 runs.' in table()


def test_rows_that_are_about_other_data_are_not_mixed(fill, says):
    tail = {**USUAL, 'train': {'samples': 900, 'digest': 'tail'}}
    option = "rows['same'] += ' train_dataloader.dataset.imbalance=100'"
    path = fill(SCORES, option, dense={'data': USUAL}, same={'data': tail})
    says('table', path)
    assert 'mixed' not in table() and 'stale' not in table()
    assert 'train 40,000 samples (usual train) and 900 samples (tail)' in table()


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


def test_rows_that_began_with_other_weights_are_left_out(started, says):
    def mixed() -> list[str]:
        says('table', started)
        return [line for line in table().splitlines() if 'mixed' in line]

    assert not mixed()
    change('three-seed1', starting_weights={'load_from': 'other'})
    (line,) = mixed()
    assert line.startswith('- `three-seed1.json`: mixed: its starting weights are first/dense-')
    assert '/iter_2.pth (other), those of 2 others first/dense-seed1-' in line
    assert '4 of 4 runs are there already' in says('run', started)
    # where as many began with either, none is taken for the right ones
    change('one-seed1', starting_weights=None)
    assert [line[3 : line.index('-seed1')] for line in mixed()] == ['two', 'three']


def test_a_check_does_not_take_other_weights_for_other_code(started, says, monkeypatch):
    change('two-seed1', starting_weights={'model.checkpoint': 'lost'})
    change('one-seed1', starting_weights={'model.checkpoint': 'lost'})
    monkeypatch.setenv('DRIFT', '0.1')
    assert says('check', started, '--rows', 'one').endswith(': one-seed1')
    assert 'checked' not in json.loads((ROWS / 'one-seed1.json').read_text())


def test_a_refuted_row_is_left_out_until_it_is_trained_anew(spec, says, monkeypatch):
    path = spec()
    says('run', path)
    says('check', path, '--seeds', '1')
    with monkeypatch.context() as elsewhere:  # a machine that rounds otherwise
        elsewhere.setenv('DRIFT', '0.01')
        said = says('check', path, '--seeds', '2')
    assert said == 'error: 1 rows did not come out again: dense-seed2'
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


def test_a_training_that_fails_refutes_nothing_and_loses_no_other(spec, says, repository, capsys):
    path = spec('seeds = [1]', other='train_cfg.row=3')
    says('run', path)
    train = (repository / 'tools/train.py').read_text()
    fails = "import sys\nif 'train_cfg.row=3' not in sys.argv: sys.exit('error: no data')\n"
    (repository / 'tools/train.py').write_text(fails + train)
    assert says('check', path) == 'error: 1 rows did not come out again: dense-seed1'
    said = 'dense-seed1 cannot be repeated: error: no data\nthe first losses of 1 of 2 rows came'
    assert capsys.readouterr().out.startswith(said)
    says('table', path)
    assert 'stale' not in table()


def test_a_loss_that_is_no_number_never_came_out_again():
    for now, equal in ((2.001, True), (2.003, False), (math.nan, False), (math.inf, False)):
        found = compared([2.0, now, 2.0], [2.0, 2.0, 2.0])
        assert found['equal'] is equal and found['finding'].startswith('loss 2 is ')
    # nor does one of a row that was no number in the first place
    assert not compared([2.0, math.nan], [2.0, math.nan])['equal']


TWO_SEEDS = {'dense': [10.0, 20.0], 'other': [11.0, 20.0]}
CONFIG: Any = METHODS['smoe'].config
MODEL = {'type': 'Classifier', 'model_name': 'vit_tiny_vqmoe', 'moe': {'preset': 'matched'}}
# An option that a method gets belongs into `spec._ADDED`, with the value that changes nothing. A
# default that changes makes another recipe, and all rows that had it stale: then its line changes.
RECIPES = {
    'smoe': '512ba48df4e4b278',
    'xmoe': 'c77d062be8bb875b',
    'stablemoe': '466f7bbc6cff6f8b',
    'softmoe': '76971d7955890699',
    'vqmoe': '55751df684565036',
    'ecmoe': 'aaa079d26de7a2ff',
    'hashmoe': 'c68418b1b471d22a',
    'mocle': 'c0d20abfb7a55e51',
    'tgrmoe': '22ea7b622cd4a540',
}


@pytest.mark.parametrize('method', METHODS)
def test_recipes_of_today_are_those_of_the_rows(method):
    config = {'model': {'model_name': f'vit_tiny_{method}', 'moe': {'preset': 'paper'}}}
    if METHODS[method].needs_features:
        config['model']['features'] = 'dense.pth'
    assert recipe_of(config) == RECIPES[method]


MOE = {'moe_layers': (2, 3)}, {'ema_decay': 0.9}, {'preset': 'paper'}


@cases(
    'change, same',
    ({'work_dir': 'elsewhere', 'resume': True, 'launcher': 'pytorch'}, True),
    ({'randomness': {'seed': 7}}, True),
    ({'default_hooks': {'checkpoint': {'interval': 7}, 'logger': {'interval': 7}}}, True),
    ({'tta_model': {'type': 'SegTTAModel'}, 'tta_pipeline': [{'type': 'TestTimeAug'}]}, True),
    ({'model': {**MODEL, 'drop': 0}}, True),  # given as 0.0
    ({'custom_hooks': [{'type': 'B'}, {'type': 'A', 'momentum': 0.1}]}, True),
    ({'val_cfg': {}}, True),
    ({'custom_hooks': [{'type': 'EMAHook'}]}, False),
    ({'default_hooks': {'param_scheduler': None}}, False),
    ({'randomness': {'seed': 7, 'deterministic': True}}, False),
    ({'train_cfg': {'max_epochs': 7}}, False),
    *(({'model': {**MODEL, 'drop': 0.0, 'moe': {**MODEL['moe'], **m}}}, False) for m in MOE),
    ({'a_field_that_nobody_knows': 1}, False),
)
def test_a_recipe_changes_with_what_may_change_a_number(change, same):
    hooks = [{'type': 'A', 'momentum': 0.1}, {'type': 'B'}]
    config = {'model': {**MODEL, 'drop': 0.0}, 'custom_hooks': hooks}
    assert (recipe_of({**config, **change}) == recipe_of(config)) == same


def test_an_option_that_is_added_leaves_recipes_unless_it_is_used(monkeypatch):
    config, used = {'model': MODEL}, {'model': {**MODEL, 'moe': {'output_norm': True}}}
    before, other = canonical(config), recipe_of(used)
    added = {**spec_module._ADDED, 'moe.output_norm': False}
    monkeypatch.setattr(spec_module, '_ADDED', added)
    assert canonical(config) == {n: v for n, v in before.items() if n != 'moe.output_norm'}
    assert recipe_of(used) == other


@pytest.mark.parametrize('of_preset', [False, True])
def test_a_changed_default_or_preset_makes_rows_stale(fill, says, monkeypatch, of_preset):
    path = fill(TWO_SEEDS, "rows['dense'] = 'dense_1x train_cfg.row=dense'")
    says('table', path)
    assert 'stale' not in table()
    defaults = CONFIG.PRESETS['paper'] if of_preset else CONFIG.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, 'router_noise', 0.125)
    says('table', path)
    recipe_then = json.loads((ROWS / 'other-seed1.json').read_text())['recipe']
    reason = f'stale: recipe {recipe_then} of commit abc, today '
    assert f'`other-seed1.json`: {reason}' in table() and f'`other-seed2.json`: {reason}' in table()
    assert '2 of 4 runs are there already' in says('run', path)
    says('table', path)
    assert 'stale' not in table()


@cases(
    'changes',
    {'first.py': ('dense=', 'plain='), 'spec.py': ('.py dense', '.py plain')},
    {'first.py': ("'dense_1x'", "'dense_1x train_cfg.max_iters=3'")},
    {'spec.py': ('iter_2', 'iter_1')},
)
def test_rows_that_would_start_from_another_run_are_stale(started, says, changes):
    for name, (before, after) in changes.items():
        Path(name).write_text(Path(name).read_text().replace(before, after))
    says('table', started, '--work-dir', 'elsewhere')
    assert '`one-seed1.json`: stale: recipe ' in table()
