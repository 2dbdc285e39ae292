"""Tables and figures of results with known answers."""

import csv
import json
import math
import sqlite3
from argparse import Namespace
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from vqmoe_vision.comparison import cli
from vqmoe_vision.comparison.cli import compare
from vqmoe_vision.comparison.figures import plot_curves
from vqmoe_vision.comparison.frame import contrasts, tidy
from vqmoe_vision.comparison.spec import read_comparison
from vqmoe_vision.comparison.store import Run, Store, images_seen

from .. import cases, full_disk
from ..rows import CONFIGS
from .conftest import ROWS, change, table

pytestmark = pytest.mark.usefixtures('tables_alone')
TABLES = Path('docs/results/tables')
# differences to dense by seed: 1, 2, 3; and 1, 0, -1
SCORES = {'dense': [10.0, 20.0, 30.0], 'better': [11.0, 22.0, 33.0], 'same': [11.0, 20.0, 29.0]}
RESULTS = CONFIGS.parent / 'docs/results'
CHECKED_IN = sorted(rows.name for rows in (RESULTS / 'rows').glob('*/'))


@pytest.mark.pages
@pytest.mark.parametrize('name', CHECKED_IN)
def test_tables_and_images_of_documents_are_those_of_their_rows(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    (tmp_path / 'rows').symlink_to(RESULTS / 'rows')
    path, folder = f'configs/comparisons/{name}.py', tmp_path / 'images'
    images = read_comparison(path).images.values()
    if not images:
        monkeypatch.setattr(cli, 'draw_figures', lambda *made: [])
    given = ['--results', str(tmp_path)] + ['--images', str(folder)] * bool(images)
    says('table', path, *given)
    table = f'tables/{name}.md'
    assert (tmp_path / table).read_text() == (RESULTS / table).read_text()
    assert {made.stem for made in folder.glob('*.png')} == set(images)
    for image in images:
        file = f'{image}.png'
        with Image.open(folder / file) as made, Image.open(f'docs/images/{file}') as kept:
            if made.info['Software'] != kept.info['Software']:
                pytest.skip(f'the image was drawn by {kept.info["Software"]}, whose letters differ')
            assert made.size == kept.size and made.tobytes() == kept.tobytes(), image


def test_numbers_of_the_table_by_hand(fill, says):
    says('table', fill(SCORES))
    with (TABLES / 'spec.csv').open() as file:
        rows = {line['row']: line for line in csv.DictReader(file)}
    # 11, 22, 33: mean 22, standard deviation 11
    better = rows['better']
    assert (float(better['score']), float(better['std'])) == pytest.approx((22, 11))
    assert (float(better['difference']), float(better['difference_std'])) == pytest.approx((2, 1))
    # p = 0.0742 (test_statistics.py); 'same' has t = 0
    assert float(better['p']) == pytest.approx(0.0742, abs=1e-4)
    assert float(rows['same']['p']) == pytest.approx(1)
    cells = [cell.strip() for cell in table().split('\n| better')[1].split('\n')[0].split('|')]
    assert cells[1:-1] == [
        '22.00', '11.00', '3', '+2.00 (-0.48 to +4.48)', '-0.27 to +4.27', '(0.070)',
        '+2.00 (-0.48 to +4.48)',
        '2.00 / 1.00', '10.0', '1.5', '0 / 1', '-', '4.25 / 4.25',
    ]  # fmt: skip


def test_small_p_and_unequal_compute(fill, says):
    # differences of 10, 10.01 and 10.02: t = 10.01 / (0.01 / sqrt(3)) = 1734
    scores = {'dense': [10.0, 20.0, 30.0], 'better': [20.0, 30.01, 40.02], 'dear': [11.0, 21.0, 31]}
    says('table', fill(scores, better={'macs': 10_400_000}, dear={'macs': 10_600_000}))
    shown, tex = table(), (TABLES / 'spec.tex').read_text()
    assert '| (<0.001) ' in shown and r' & (\textless{}0.001) & ' in tex
    assert '| dear* ' in shown and '| better ' in shown
    assert '\n- \\* does not have the compute of dense' in shown  # no list in the list
    # a bare percent sign would comment the rest of the caption out
    assert r'differ by more than 5\%.' in tex and ' * does not' in tex


def test_nothing_is_finished_yet(spec, says):
    path = spec("images = {'curves': 'curves'}\nshifts = {'fog': 'model.fog=1'}")
    for action in ('table', 'check', 'shifts', 'routing'):
        assert says(action, path).startswith('error: no run of spec can be ')


@cases(
    'more, flags, field',
    ("also = ['mIuO']", ['table'], "also='mIuO'"),
    ("images = {'shifts': 'fog'}", ['table', '--images', '.'], "images='shifts'"),
    ('', ['table', '--images', '.'], '--images'),
    ('', ['check', '--sample', '0'], '--sample=0'),
    ('', ['run', '--jobs', '0'], '--jobs=0'),
)
def test_mistakes_are_one_line(fill, says, more, flags, field):
    path = fill(SCORES, more)
    line = says(flags[0], path, *flags[1:])
    assert line.startswith('error: ') and field in line and '\n' not in line


def test_rows_that_the_comparison_does_not_name_are_one_line(fill, says, capsys):
    path = fill(SCORES)
    for name in ('hello-seed1.json', 'dense-seed9.json'):
        (ROWS / name).write_text('{}')
    line = 'dense-seed9.json, hello-seed1.json: the comparison names no such row or seed'
    compare(['table', path])
    assert f'left out: {line}\n' in capsys.readouterr().err
    assert f'- `{line.replace(": ", "`: ")}\n' in table()


def test_figures_of_curves_have_means_with_bands_and_other_rows_grey(fill, says):
    path = Path(fill(SCORES))
    more = "highlighted = ['better', 'dense']\nrows['not run'] = 'train_cfg.row=none'"
    path.write_text(f'{path.read_text()}\n{more}\n')
    comparison = read_comparison(str(path))
    runs = [Run(comparison, row, seed, Path('work')) for row, seed in comparison.selected()]
    figure = plot_curves(comparison, Store(ROWS).read(runs).usable)
    held_out, over_compute = figure.axes
    same, better, dense = held_out.get_lines()  # what is behind is drawn first
    assert same.get_label() == '_same' and same.get_color() == '0.8'
    assert better.get_label() == 'better (3)' and better.get_color() != dense.get_color()
    assert better.get_xydata().tolist() == [[1, 11.0], [2, 22.0]]  # half the scores first
    # ten million each, an image at a time
    assert over_compute.get_lines()[1].get_xydata().tolist() == [[1e-5, 11.0], [2e-5, 22.0]]
    (band,) = held_out.collections[0].get_paths()
    # standard deviations 5.5 and 11
    assert {tuple(point) for point in band.vertices} == {(1, 5.5), (1, 16.5), (2, 11), (2, 33)}
    assert figure.legends[0].get_texts()[-1].get_text() == 'other rows: 1'
    assert 'spec-curves.png' in says('table', str(path))


def test_what_is_left_under_a_shift_is_of_the_own_score_of_each_run(fill, says):
    scores = {'dense': [10.0, 20.0, 40.0], 'a': [20.0, 40.0, 50.0], 'none': [0.0, 0.0, 1.0]}
    path = fill(scores, "shifts = {'fog': 'model.fog=1'}")
    shifted = {'dense': {2: 12, 3: 28}, 'a': {1: 12, 2: 26, 3: 40}, 'none': {1: 0, 2: 0, 3: 0.5}}
    for row, values in shifted.items():
        for seed, score in values.items():
            change(f'{row}-seed{seed}', shifts={'fog': {'model.fog=1': float(score)}})
    says('table', path)
    shown = table().split('| shift')[1].splitlines()
    cells = [[cell.strip() for cell in line.split('|')] for line in shown[2:5]]
    # of dense 60 and 70 %, of a 60, 65 and 80 %: +5 and +10, whose standard deviation is 3.54, so
    # that 12.706 * 3.54 / sqrt(2) is 31.77; of the third row only one run has a score
    assert [[line[2], *line[-3:-1]] for line in cells] == [
        ['dense', '65.00', '-'],
        ['a', '68.33', '+7.50 (-24.27 to +39.27), 2 pairs'],
        ['none', '50.00', '-20.00, 1 pair'],
    ]


@cases(
    'by_epoch, drop_last, iterations, images',
    # ten images in batches of four, of which the third holds two: 4 + 4 + 2, 4
    (True, False, 4, 14),
    (True, False, 6, 20),
    (True, True, 6, 24),  # 4 + 4 an epoch
    (False, False, 6, 24),  # a sampler that goes on fills the batch,
)
def test_images_seen(by_epoch, drop_last, iterations, images):
    loader = dict(batch_size=4, drop_last=drop_last)
    config = dict(train_cfg=dict(max_epochs=2) if by_epoch else {}, train_dataloader=loader)
    record = dict(iterations=iterations, data=dict(train=dict(samples=10)))
    assert images_seen(config, record) == images


def found(path: str) -> pd.DataFrame:
    work = {'work_dir': Path('work'), 'results': Path('docs/results'), 'rows': None, 'seeds': None}
    of = cli.Work(Namespace(spec=path, **work))
    results = of.read()
    return contrasts(of.comparison, results, tidy(of.comparison, results))


# differences to dense: 2, 2.001, 2; and 1, 1.1, 1.3
SURE = {'dense': [10.0, 20.0, 30.0], 'sure': [12.0, 22.001, 32.0], 'near': [11.0, 21.1, 31.3]}


def test_contrasts_are_corrected_among_themselves(fill, says):
    """By the noise of all rows; other rows have a p in brackets, which is not corrected."""
    path = fill(SURE, "contrasts = ['sure - dense', 'near - dense']\nmargin = 1.5")
    says('table', path)
    sure, near = (line for _, line in found(path).iterrows())
    # less the means of rows and of seeds squares are 0.03114, over (3 - 1)(3 - 1): a difference of
    # two rows has a deviation of sqrt(2 x 0.00778), and their mean one of that over sqrt(3)
    assert sure['pooled_noise'] == near['pooled_noise'] == pytest.approx(0.1248, abs=1e-4)
    half = 2.7764 * 0.1248 / math.sqrt(3)  # t of four degrees of freedom
    ends = near['pooled_low'], near['pooled_high']
    assert ends == pytest.approx((1.1333 - half, 1.1333 + half), abs=1e-3)
    assert near['p_holm'] == near['p'] and sure['p_holm'] == pytest.approx(2 * sure['p'])
    assert sure['finding'] == near['finding'] == 'better'
    shown = table()
    assert '| sure - dense | 3 of 3 ' in ' '.join(shown.split())
    assert 'for all 2 contrasts' in shown and '(4 degrees of freedom)' in shown


def test_what_is_found_is_one_of_four_words(fill):
    rows = {'a': [10.0, 20.0, 30.0], 'b': [10.1, 20.0, 29.9], 'c': [7.0, 17.1, 26.9]}
    named = "contrasts = ['a - b', 'c - a', 'd - a']\nmargin = 0.5"
    path = fill({**rows, 'd': [10.3, 20.9, 30.6], 'e': [10.0, 20.4, 29.7]}, named)
    frame = found(path)
    words, equal = frame['finding'].to_dict(), frame.loc['a - b']
    # the smallest of three: corrected by their number
    assert equal['p_equal_holm'] == pytest.approx(3 * equal['p_equal'])
    assert words == {'a - b': 'equal within 0.5', 'c - a': 'worse', 'd - a': 'better'}
    Path(path).write_text(Path(path).read_text().replace('margin = 0.5', 'margin = 0.01'))
    assert found(path)['finding']['a - b'] == 'open'


def test_noise_is_that_of_all_comparisons_of_the_budget_and_data(fill):
    path = fill(SURE, "contrasts = ['near - dense']")
    alone = found(path).iloc[0]
    other, budget = Path('docs/results/rows/other'), Path('docs/results/rows/longer')
    for folder in (other, budget):
        folder.mkdir()
        for row in ROWS.iterdir():
            content = json.loads(row.read_text())
            content['test']['mIoU'] += 0.3 * content['seed'] * (content['row'] == 'sure')
            if folder is budget:
                content['budget'] = 'another'
            (folder / row.name).write_text(json.dumps(content))
    counted = found(path).iloc[0]
    assert counted['pooled_noise'] > 1.3 * alone['pooled_noise']
    # one whose variance is another does not count, nor does a damaged one
    for text in (None, 'damaged'):
        for row in other.iterdir():
            content = json.loads(row.read_text())
            content['test']['mIoU'] += 9 * content['seed'] * (content['row'] == 'sure')
            row.write_text(text or json.dumps(content))
        assert found(path).iloc[0].equals(alone)


def test_a_forest_has_a_line_per_comparison_and_one_for_all(fill, says):
    first = fill(SURE, "contrasts = ['near - dense', 'sure - near']")
    Path('first.py').write_text(Path(first).read_text().replace(", 'sure - near'", ''))
    ROWS.rename(ROWS.with_name('first'))
    for folder in Path('work_dirs/comparisons').iterdir():
        folder.rename('gone')
    fill({'dense': [10.0, 20.0, 30.0], 'sure': [9.0, 19.5, 29.0], 'near': [12.0, 21.0, 32.0]})
    Path('spec.py').write_text(Path('spec.py').read_text() + "contrasts = ['near - dense']\n")
    said = says('forest', 'first.py', 'spec.py', '--out', 'drawn/forest.png')
    lines = [[c.strip() for c in x.split('|')[1:4]] for x in said.splitlines() if 'near' in x]
    assert [line[1] for line in lines] == ['first', 'spec', 'together']
    assert float(lines[0][2]) < float(lines[2][2]) < float(lines[1][2])
    assert Path('drawn/forest.png').is_file()
    # a contrast that a comparison does not name counts where it has both rows
    said = says('forest', 'first.py', 'spec.py', '--contrasts', 'sure - dense')
    lines = [[c.strip() for c in x.split('|')[1:4]] for x in said.splitlines() if 'sure' in x]
    assert [line[1] for line in lines] == ['first', 'spec', 'together']
    assert (float(lines[0][2]), float(lines[1][2])) == (2, pytest.approx(-0.83))
    Path('configs/comparisons').mkdir(parents=True)
    for name in ('first.py', 'spec.py'):
        Path(name).rename(f'configs/comparisons/{name}')
    Path('page.md').write_text(
        '<!-- compare together "sure - dense" : first spec -->\n<!-- end -->'
    )
    says('pages', 'page.md')
    near, sure = Path('page.md').read_text().splitlines()[4:6]
    assert near.startswith('|near - dense|+') and near.endswith('|2 above 0, 0 below|')
    assert sure.startswith(f'|sure - dense|{lines[2][2]} (') and '|1 above 0, 1 below|' in sure


def test_validation_images_stand_beside_a_contrast_that_they_turn(fill, says):
    named = "contrasts = ['near - dense', 'sure - dense']\nmargin = 1.5"
    path = fill(SURE, named)
    says('table', path)
    assert 'otherwise on validation images' not in table()
    for seed in (1, 2, 3):  # near is 1, 1.1 and 1.3 above dense on test images
        change(f'near-seed{seed}', held_out=[[1, 5.0], [2, 10.0 * seed - 2 - seed / 10]])
    says('table', path)
    near, sure = (line.split('|') for line in table().splitlines() if ' - dense ' in line)
    assert near[-2].strip().startswith('-2.20 (') and near[-2].strip().endswith(', worse')
    assert sure[-2].strip() == '-'


def test_tables_of_a_page_are_made_where_they_stand(fill, says):
    Path('configs/comparisons').mkdir(parents=True)
    Path(fill(SCORES)).rename('configs/comparisons/spec.py')
    opening = 'Above.\n\n<!-- compare {} dense better other : "spec=A title" -->\n'
    page = f'{opening}{{}}<!-- end -->\nBelow.\n'
    Path('page.md').write_text(page.format('scores', 'old\n'))
    assert says('pages', 'page.md') == 'page.md\n'
    made = Path('page.md').read_text()
    # the mean of 10, 20, 30, and that of 11, 22, 33 with what it is above
    table = '||A title|\n|:---|:---|\n|dense|20.0|\n|better|22.0 (+2.0)|\n|other|-|\n'
    assert table in made and 'old' not in made
    assert made.startswith('Above.') and made.endswith('Below.\n')
    says('pages', 'page.md')
    assert Path('page.md').read_text() == made
    Path('page.md').write_text(page.format('scroes', ''))
    assert says('pages', 'page.md').startswith("error: compare='scroes' is not possible")


@pytest.mark.parametrize('action', ['pages', 'table'])
def test_on_a_full_disk_the_earlier_file_stays(fill, says, action):
    Path('configs/comparisons').mkdir(parents=True)
    Path(fill(SCORES)).rename('configs/comparisons/spec.py')
    page = '<!-- compare scores dense better : spec -->\n<!-- end -->\n'
    files = [Path('page.md'), *(TABLES / f'spec.{suffix}' for suffix in ('md', 'tex', 'csv'))]
    files[0].write_text('old\n' * 1000 + page)
    commands = {'pages': 'page.md', 'table': 'configs/comparisons/spec.py'}
    for command in commands.items():
        says(*command)
    earlier_bytes = [file.read_bytes() for file in files]
    with full_disk(500):
        error = says(action, commands[action])
    assert error.startswith('error: ') and ' could not be written' in error
    assert [file.read_bytes() for file in files] == earlier_bytes


def entries(file: Path) -> list[tuple[str, int, dict]]:
    """The run, the step and the numbers of each."""
    with closing(sqlite3.connect(file)) as known:
        found = known.execute('select run_name, step, metrics from metrics order by id')
        return [(name, step, json.loads(numbers)) for name, step, numbers in found]


def test_rows_are_runs_of_trackio(fill, says, tmp_path, monkeypatch):
    pytest.importorskip('trackio')
    for module in ('utils', 'sqlite_storage'):
        monkeypatch.setattr(f'trackio.{module}.TRACKIO_DIR', tmp_path)
    file = tmp_path / 'spec.db'
    path = fill({'dense': [60.0, 61.0], 'moe': [62.5]}, 'seeds = [1, 2]\n')
    assert '3 runs' in says('export', path, '--to', 'trackio')
    # two points of each curve, the later one with the test
    found = entries(file)
    names = ('dense-seed1', 'moe-seed1', 'dense-seed2')
    assert [entry[:2] for entry in found] == [(name, step) for name in names for step in (1, 2)]
    assert found[2][2] == {'train/loss': 2.0, 'val/mIoU': 31.25}
    assert found[3][2].items() >= {'train/loss': 1.0, 'val/mIoU': 62.5, 'test/mIoU': 62.5}.items()
    assert found[3][2]['test/blocks.3.mlp/load_unused'] == 1.0
    with closing(sqlite3.connect(file)) as known:
        ((config,),) = known.execute("select config from configs where run_name = 'moe-seed1'")
    assert json.loads(config).items() >= {'row': 'moe', 'seed': 1, 'macs': 10**7}.items()
    # once more, they are in the place of those before
    says('export', path, '--to', 'trackio', '--rows', 'moe')
    assert sorted(entries(file), key=str) == sorted(found, key=str)
