"""What a comparison may say of itself, and that those of the repository can be built."""

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

import vqmoe_vision.classification
import vqmoe_vision.segmentation  # noqa: F401  both register models
from vqmoe_vision.comparison.cli import compare
from vqmoe_vision.comparison.figures import curve_styles
from vqmoe_vision.comparison.rows import CONTROLS, FEATURE_ROWS, ROWS
from vqmoe_vision.comparison.runs import Run
from vqmoe_vision.comparison.spec import read_comparison
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.config import parse_options
from vqmoe_vision.engine.trained import without_sources
from vqmoe_vision.models.complexity import complexity
from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe.config import MoeConfig
from vqmoe_vision.moe.layer import MoeLayer

from ..rows import CONFIGS
from .conftest import SPEC

SPECS = sorted(CONFIGS.glob('comparisons/*.py'))
# Options that rows of finished comparisons had: they can be read, and not be trained again.
GONE = ('ema_decay_warmup', 'ema_bias_correction', 'usage_from_kmeans', 'codebook=gradient')
# the paper's tables: docs/compare.md
PAPER = (
    'classification/cifar100.py',
    'segmentation/ade20k/segmenter_vit-s-vqmoe_mask_8xb1-160k_ade20k-512x512.py',
)


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)


@pytest.mark.parametrize('path', SPECS, ids=lambda path: path.stem)
def test_every_row_of_every_comparison_can_be_built(path: Path, root: None) -> None:
    comparison = read_comparison(str(path))
    for row in comparison.rows:
        run = Run(comparison, row, comparison.seeds[0], Path('work_dirs'))
        config = load_config(comparison.config, parse_options(run.options))
        own = [option for option in run.options if any(gone in option for gone in GONE)]
        refused = pytest.raises((TypeError, ValueError)) if own else nullcontext()
        scope = DefaultScope.overwrite_default_scope(config.default_scope)
        with refused, torch.device('meta'), scope:
            MODELS.build(config.model.get('backbone', config.model))
        assert config.default_hooks.record.type == 'RunRecordHook'


@pytest.mark.parametrize('path', SPECS, ids=lambda path: path.stem)
def test_curves_of_no_two_rows_look_alike(path: Path, root: None) -> None:
    comparison = read_comparison(str(path))
    for shown in (comparison, replace(comparison, highlighted=())):
        styles = curve_styles(shown)
        assert [*styles] == list(shown.highlighted or shown.rows)
        looks = [(look['color'], str(look['linestyle'])) for look in styles.values()]
        assert len({*looks}) == len(looks)


def test_controls_are_a_frozen_router_and_a_fixed_assignment() -> None:
    assert sorted(CONTROLS) == ['position', 'smoe_frozen']


@pytest.mark.parametrize('path', SPECS, ids=lambda path: path.stem)
def test_every_comparison_that_tests_has_both_controls_and_dense_beside_it(
    path: Path, root: None
) -> None:
    comparison = read_comparison(str(path))
    if comparison.name == 'digits':  # which decides nothing
        return
    if not comparison.tested:  # what is chosen by it meets the controls in a table of its own
        assert not comparison.contrasts
        return
    assert {'dense_1x', 'dense_2x'} < comparison.rows.keys()
    assert comparison.contrasts and comparison.margin
    for made in {'_started' if '_started' in row else '' for row in comparison.rows}:
        learned = [row for row in comparison.rows if row in ('smoe' + made, 'ema' + made)]
        assert not learned or {f'{control}{made}' for control in CONTROLS} < comparison.rows.keys()


def test_methods_that_are_screened_have_as_many_trials_or_all_there_are(root: None) -> None:
    screenings = [spec for spec in map(read_comparison, map(str, SPECS)) if not spec.tested]
    assert screenings
    for screening in screenings:
        trials: dict[str, list[str]] = {}
        for row in (row for row in screening.rows if '_' in row and row not in ROWS):
            trials.setdefault(row.partition('_')[0], []).append(row)
        most = max(map(len, trials.values()))
        assert sum(len(rows) == most for rows in trials.values()) > 1
        for method, rows in trials.items():
            own = (
                METHODS[method.replace('position', 'hashmoe')].config.option_names()
                - MoeConfig.option_names()
            )
            set_there = ' '.join(word for row in rows for word in screening.rows[row])
            assert len(rows) == most or all(f'moe.{name}=' in set_there for name in own)


def test_every_option_of_vqmoe_has_a_line_on_its_default() -> None:
    page = (CONFIGS.parent / 'docs/methods.md').read_text()
    lines = page.split('### What stands behind the defaults')[1].split('\n### ')[0]
    measured, names = set(), set[str]()
    for line in lines.splitlines():
        first, _, known, *_ = [*line.strip('|').split('|'), '', '']
        names = set(re.findall(r'`(\w+)[=`]', first)) or names  # an empty cell is of the row above
        if re.search(r'\d', known):
            measured |= names
    assert METHODS['vqmoe'].config.option_names() - {'preset'} - measured == set()


@pytest.mark.parametrize('leaf', PAPER)
def test_a_config_is_a_comparison_of_all_rows(leaf: str, root: None) -> None:
    comparison = read_comparison(f'configs/{leaf}')
    assert comparison.rows.keys() == {*ROWS, *CONTROLS}
    assert comparison.contrasts[0] == 'smoe - smoe_frozen'
    assert comparison.also == (('aAcc', 'mAcc') if 'segmentation' in leaf else ())
    assert len(comparison.seeds) == 5
    size = 'small' if 'vit-s' in leaf else 'tiny'
    field = 'model.backbone' if 'segmentation' in leaf else 'model'
    assert f'{field}.model_name=vit_{size}_smoe' in comparison.rows['smoe']
    assert comparison.metric == ('mIoU' if 'segmentation' in leaf else 'accuracy/top1')


# models of timm, with weights
KEPT = (
    'classification/finetune/imagenette.py',
    'segmentation/ade20k/segmenter_vit-s-vqmoe-in21k-pre_mask_8xb1-160k_ade20k-512x512.py',
)


@pytest.mark.parametrize('leaf', KEPT)
def test_rows_keep_a_model_of_timm_and_its_weights(leaf: str, root: None) -> None:
    comparison = read_comparison(f'configs/{leaf}')
    assert comparison.rows.keys() == {*ROWS, *CONTROLS} - {'dense_2x'}  # whose weights fit none
    for row in comparison.rows:
        run = Run(comparison, row, 1, Path('work_dirs'))
        own, model = (c.model.get('backbone', c.model) for c in (comparison.base, run.merged()))
        assert (model.model_name, model.pretrained) == (own.model_name, True)
        if row == 'dense_1x':
            assert model.moe is None
        else:
            method = row.partition('_')[0].replace('position', 'hashmoe')
            assert model.moe.method == method
        scope = DefaultScope.overwrite_default_scope(comparison.base.default_scope)
        with torch.device('meta'), scope:
            built = MODELS.build(without_sources(model))
        assert any(isinstance(part, MoeLayer) for part in built.modules()) == (row != 'dense_1x')


@pytest.mark.parametrize(
    ('name', 'options', 'of_all_rows', 'moe_blocks'),
    [
        ('vit_tiny_vqmoe', dict(moe=dict(moe_layers='last2')), [], 2),
        ('vit_tiny_vqmoe', dict(moe=dict(moe_layers='every3')), [], 4),
        ('vit_tiny_vqmoe', dict(moe=dict()), [], 6),  # every second block of twelve
        ('vit_tiny_vqmoe', dict(moe=dict()), ['model.depth=6'], 3),
        ('vit_tiny_vqmoe', dict(depth=4, moe=dict(moe_layers=[0])), [], 1),
        ('vit_tiny_patch16_224', dict(moe=dict(method='vqmoe')), [], 6),
        ('vit_tiny_patch16_224', dict(moe=dict(method='vqmoe', moe_layers=(1, 3, 4))), [], 3),
    ],
)
def test_dense_2x_has_the_compute_of_two_experts_in_every_config(
    name: str, options: dict, of_all_rows: list[str], moe_blocks: int, tmp_path: Path
) -> None:
    own = dict(type='Classifier', model_name=name, num_classes=10, img_size=32, patch_size=4)
    own |= {**options, 'moe': {'preset': 'matched', **options['moe']}, '_delete_': True}
    path, spec = tmp_path / 'own.py', tmp_path / 'compared.py'
    path.write_text(f'_base_ = {str(CONFIGS / "classification/cifar10.py")!r}\nmodel = {own}\n')
    rows = {row: row for row in ('dense_1x', 'dense_2x', 'smoe')}
    fields = f"config = {str(path)!r}\nmetric = 'accuracy/top1'\nseeds = [1]\nrows = {rows}\n"
    spec.write_text(f'{fields}options = {of_all_rows}\n')
    comparison = read_comparison(str(spec))
    assert f'model.extra_mlps={moe_blocks}' in comparison.rows['dense_2x']
    macs = {}
    for row in ('dense_1x', 'dense_2x', 'smoe'):
        config = Run(comparison, row, 1, Path('work_dirs')).merged()
        with torch.device('meta'), DefaultScope.overwrite_default_scope(config.default_scope):
            macs[row] = complexity(MODELS.build(config.model).model).macs
    # a router has a product with 8 vectors, where an MLP of width 192 has 2 x 768
    assert macs['smoe'] == pytest.approx(macs['dense_2x'], rel=0.01)
    assert macs['dense_2x'] > 1.05 * macs['dense_1x']


def test_pretrained_weights_fit_no_wider_model(says, root: None, tmp_path: Path) -> None:
    path = tmp_path / 'wide.py'
    config = 'configs/classification/finetune/imagenette.py'
    path.write_text(SPEC.format(rows="wide='dense_2x'").replace('config.py', config))
    assert says('list', str(path), '--work-dir', str(tmp_path)) == (
        'error: comparison wide: row wide: model.extra_mlps=2 is not possible: '
        '0 beside pretrained weights'
    )


def test_a_model_of_no_size_has_no_rows(says, root: None) -> None:
    said = says('list', 'configs/classification/test_vit.py')
    assert "model.model_name='test_vit_vqmoe' is of no size of" in said


def test_a_dense_config_has_no_rows_with_experts(says, root: None) -> None:
    leaf = 'configs/classification/imagenet/vit_tiny_dense_imagenet.py'
    said = says('list', leaf)
    assert said.startswith(f'error: {leaf}: model.moe=None makes a dense model, and row ')


def test_a_config_and_a_comparison_of_one_name_share_no_folder(root: None) -> None:
    names = [read_comparison(str(path)).name for path in SPECS]
    configs = [path for path in CONFIGS.rglob('*.py') if path not in SPECS and path.stem in names]
    assert len(configs) == 1  # that of CIFAR-10
    names += [read_comparison(str(path)).name for path in configs]
    assert len(set(names)) == len(names) and 'classification-cifar10_budget' in names


def test_options_of_the_row_win_over_the_budget(spec) -> None:
    comparison = read_comparison(
        spec("options = ['train_cfg.max_iters=7']", own='train_cfg.max_iters=9')
    )
    run = Run(comparison, 'own', 2, Path('work'))
    assert run.resolved['train_cfg']['max_iters'] == 9
    assert run.resolved['randomness'] == {'seed': 2}
    other = Run(comparison, 'dense', 2, Path('work'))
    assert other.resolved['train_cfg']['max_iters'] == 7
    assert run.folder != other.folder


def test_another_budget_never_resumes_the_checkpoints_of_this_one(spec) -> None:
    folders = set()
    for number in (7, 8):
        path = spec(f"options = ['train_cfg.max_iters={number}']")
        folders.add(Run(read_comparison(path), 'dense', 1, Path('work')).folder)
    assert len(folders) == 2


def test_values_with_spaces_are_quoted_as_on_a_command_line(spec) -> None:
    comparison = read_comparison(spec(own='smoe model.moe.moe_layers="(1, 3)"'))
    run = Run(comparison, 'own', 1, Path('work'))
    assert run.resolved['model']['moe']['moe_layers'] == [1, 3]
    assert "'model.moe.moe_layers=(1, 3)'" in run.line()


def test_all_methods_follow_the_table(spec) -> None:
    comparison = read_comparison(
        spec('all_methods = True', more_experts='smoe model.moe.num_experts=16')
    )
    assert tuple(comparison.rows) == (*ROWS, 'dense', 'more_experts')
    assert comparison.rows['more_experts'][-1] == 'model.moe.num_experts=16'


def test_all_presets_are_those_that_differ_from_the_rows_of_the_methods(spec) -> None:
    comparison = read_comparison(spec('all_presets = True'))
    differing = {
        f'{name}_{preset}'.replace('hashmoe', 'position')
        for name, method in METHODS.items()
        for preset in method.config.PRESETS
        if method.config.from_options(preset=preset) != method.config.from_options(preset='matched')
    }
    assert differing == comparison.rows.keys() - {'dense'}
    assert comparison.rows['smoe_frozen'][-1] == 'model.moe.preset=frozen'


def test_rows_that_start_from_another_run_take_it_at_their_seed(spec, says) -> None:
    spec()
    Path('first.py').write_text(Path('spec.py').read_text())
    path = spec("start = 'first.py dense iter_2.pth'\nall_started = True")
    comparison = read_comparison(path)
    assert comparison.rows.keys() == {'dense'} | {
        f'{row}_started' for row in (*ROWS, *FEATURE_ROWS) if row != 'dense_2x'
    }
    first = Run(read_comparison('first.py'), 'dense', 2, Path('work')).folder
    run = Run(comparison, 'smoe_started', 2, Path('work'))
    assert (
        run.resolved['model']['checkpoint']
        == str(first / 'iter_2.pth')
        == str(run.sources['{start}'][1])
    )
    assert Run(comparison, 'dense', 2, Path('work')).sources == {}
    path = spec("start = 'first.py dense iter_2.pth'", a='smoe model.checkpoint={start:other}')
    assert says('run', path).startswith('error: comparison spec: {start:other}: row other does not')
    Path('first.py').write_text(Path(spec(other='smoe')).read_text())
    path = spec("start = 'first.py dense iter_2.pth'", a='smoe model.checkpoint={start:other}')
    source, _ = Run(read_comparison(path), 'a', 2, Path('work')).sources['{start:other}']
    assert source == Run(read_comparison('first.py'), 'other', 2, Path('work'))


def test_a_row_that_starts_from_two_runs_has_the_checkpoint_of_each(spec, says) -> None:
    other = 'smoe-wide'  # a name as any other
    Path('first.py').write_text(Path(spec(f"rows['{other}'] = 'smoe'")).read_text())
    both = 'smoe model.features={start} model.checkpoint={start:smoe-wide}'
    path = spec("start = 'first.py dense iter_2.pth'", both=both)
    work, first = Path('work_dirs/comparisons'), read_comparison('first.py')
    run = Run(read_comparison(path), 'both', 1, work)
    dense, wide = (Run(first, row, 1, work).folder / 'iter_2.pth' for row in ('dense', other))
    model = run.resolved['model']
    assert (model['features'], model['checkpoint']) == (str(dense), str(wide))
    elsewhere = Run(read_comparison(path), 'both', 1, Path('elsewhere'))
    assert elsewhere.folder.name == run.folder.name
    said = says('run', path, '--rows', 'both', '--seeds', '1')
    assert f'2 runs that others start from come first: first/dense-seed1, first/{other}' in said
    assert Path('docs/results/rows/spec/both-seed1.json').is_file()


def test_rows_trained_alike_for_the_comparison_that_others_start_from_count_too(fill, says) -> None:
    first = Path(fill({'a': [1.0, 2.0], 'b': [1.0, 2.0]})).read_text()
    Path('first.py').write_text(first)
    Path('docs/results/rows/spec').rename('docs/results/rows/first')
    # in the second, row b is another one
    second = first.replace('train_cfg.row=b', 'train_cfg.row=c')
    Path('spec.py').write_text(f"{second}\nstart = 'first.py a iter_2.pth'")
    waiting = says('list', 'spec.py', '--rows', 'a', 'b').splitlines()
    assert [re.search('spec/(.*?)-seed', line)[1] for line in waiting] == ['b', 'b']
    assert says('run', 'spec.py', '--rows', 'a').startswith('2 of 2 runs are there already')


def test_rows_that_decide_by_features_have_those_of_the_start(spec) -> None:
    assert FEATURE_ROWS and not set(FEATURE_ROWS) & set(ROWS)
    spec()
    Path('first.py').write_text(Path('spec.py').read_text())
    start = "start = 'first.py dense iter_2.pth'\nall_methods = True"
    comparison = read_comparison(spec(start))
    assert tuple(comparison.rows) == (*ROWS, *FEATURE_ROWS, 'dense')
    first = Run(read_comparison('first.py'), 'dense', 1, Path('work')).folder
    for row in FEATURE_ROWS:
        run = Run(comparison, row, 1, Path('work'))
        assert run.resolved['model']['features'] == str(first / 'iter_2.pth')
    assert tuple(read_comparison(spec('all_methods = True')).rows) == (*ROWS, 'dense')


@pytest.mark.parametrize(
    ('more', 'said'),
    [
        ("start = 'dense'", "start='dense' must be 'COMPARISON ROW CHECKPOINT'"),
        (
            "rows = dict(dense='dense_1x', a='smoe model.checkpoint={start}')",
            'a needs the field start',
        ),
        (
            "start = 'first.py dense a.pth'\noptions = ['model.checkpoint={start}']",
            "options='model.checkpoint={start}' is not possible: {start} in rows alone",
        ),
        (
            "start = 'first.py dense a.pth'\nrows = dict(dense='dense_1x', a='smoe a={start:b-c}')",
            '{start:b-c}: row b-c does not exist; there are dense',
        ),
        (
            "start = 'first.py dense a.pth'\nrows = dict(dense='dense_1x', a='smoe a={start:}')",
            '{start:}: row  does not exist; there are dense',
        ),
        (
            "start = 'first.py dense a.pth'\nrows = dict(b='dense_1x', a='smoe a={start :dense}')",
            "a={start :dense}' is not possible: {start} or '{start:ROW}'",
        ),
        ("all_methods = True\nrows = dict(smoe='vqmoe')", "rows ['smoe'] stand for others"),
        ('seeds = []', 'seeds is empty'),
        ("seeds = ['1', '2']", "seeds=('1', '2') is not possible: whole numbers"),
        ('seeds = [-1]', 'seeds=(-1,) is not possible: whole numbers from 0 to 4294967295'),
        ('seeds = [2**40]', 'is not possible: whole numbers from 0 to 4294967295'),
        ("rows = ['dense']", "spec.py: rows=['dense'] is not possible: texts by name"),
        ("rows = {1: 'dense'}", "spec.py: rows={1: 'dense'} is not possible: texts by name"),
        ("shifts = ['fog']", "spec.py: shifts=['fog'] is not possible: texts by name"),
        ("shifts = dict(fog='fog')", "shifts.fog='fog' is not possible: --cfg-options fog: write"),
        (
            "shifts = dict(fog='a.b=1')",
            "shifts.fog='a.b=1' is not possible: a.b=1 ",
        ),
        (
            "rows = dict(one='dense_1x a=\\'1')",
            'rows.one="dense_1x a=\'1" is not possible: No closing',
        ),
        ('rows = dict(', "spec.py, line 5: '(' was never closed"),
        ('metric = 3', 'spec.py: metric=3 is not possible: a text'),
        (
            "rows['one'] = 'smoe model.moe.absent=1'",
            'comparison spec: row one: model.moe.absent=1 is not possible: the options are',
        ),
        (
            "rows['one'] = 'vqmoe model.moe.ema_decay=2.0'",
            'row one: model.moe.ema_decay=2.0 is not possible: at least 0 and below 1',
        ),
        ("rows['one'] = 'dense_1x model.embed_dim=-1'", 'comparison spec: row one: '),
        ('seeds = 5', 'seeds=5 is not possible: a list'),
        ("also = 'mAcc'", "also='mAcc' is not possible: a list"),
        ("options = 'model.depth=2'", "options='model.depth=2' is not possible: a list"),
        ("contrasts = 'dense'", "contrasts='dense' is not possible: a list"),
        ("contrasts = ['dense']", "contrasts='dense' is not possible: 'ROW - OTHER'"),
        ("contrasts = ['dense - smoke']", 'row smoke does not exist; there are dense'),
        ("margin = 'one'", "margin='one' is not possible: a number"),
        ('margin = -1.0', 'margin=-1.0 is not possible: above 0'),
        ("highlighted = 'dense'", "highlighted='dense' is not possible: a list"),
        ("highlighted = ['smoke']", 'row smoke does not exist; there are dense'),
        *(
            (
                f'rows = {{"dense": "dense_1x", "{row}": "smoe"}}',
                f'row={row!r} is not possible: a name',
            )
            for row in ('lr/2', 'lr/', '/')
        ),
        ('seeds = [1, 2, 1]', 'seeds [1] are there twice'),
        ("reference = 'smoke'", 'row smoke does not exist; there are dense'),
        ("rows = dict(one='smoke')", "row 'smoke' does not exist"),
        ('rows = dict(one=3)', "rows={'one': 3} is not possible: texts by name"),
        ("rows = dict(dense='dense_1x', one='optimiser.lr=3')", 'optimiser.lr=3 is not possible'),
        ("rows = dict(dense='dense_1x', one='model.depth')", "row 'model.depth' does not exist"),
        ("stage = 'val'", "stage='val' is not possible: one of ('test', 'dev')"),
        ("stage = 'dev'\nshifts = dict(a='model.b=1')", "none with stage='dev', which tests"),
        ("also = ['mIoU']", "also='mIoU' is the metric, which the table has"),
        ("start = 'spec.py dense iter_2.pth'", 'spec.py: start='),
        ("config = 'first.py'", 'first.py: model.model_name=None must be the name of a model'),
        ("shifts = dict(a='train_cfg.max_iters=1')", "begins with 'test_' or 'model.'"),
        ("all_methods = 'False'", "all_methods='False' is not possible: True or False"),
        ('also = [3]', 'also=[3] is not possible: a list of texts'),
        ('options = [3]', 'options=[3] is not possible: a list of texts'),
        ("options = ['randomness.seed=3']", "options='randomness.seed=3' is not possible: left to"),
        ("rows['one'] = 'smoe randomness.seed=3'", "rows.one='randomness.seed=3' is not possible"),
        ("budget = 'long'", "fields ['budget'] are missing or not known"),
        ("config = 'absent.py'", "No such file or directory: 'absent.py'"),
    ],
)
def test_mistakes_are_one_line(spec, says, more: str, said: str) -> None:
    Path('first.py').write_text(Path(spec()).read_text())
    line = says('list', spec(more))
    assert line.startswith('error: ') and said in line and '\n' not in line


def test_an_unknown_argument_is_shown_no_option_that_there_is_not(spec, capsys) -> None:
    with pytest.raises(SystemExit, match='2'):
        compare(['list', spec(), '--jobs', '2'])
    assert capsys.readouterr().err.endswith('error: unrecognized arguments: --jobs 2\n')


def test_no_run_starts_where_one_could_not(spec, says) -> None:
    path = spec(wrong='smoe model.moe.absent=1')
    assert 'row wrong: model.moe.absent=1 is not possible' in says('run', path)
    assert not Path('calls').exists()
    assert says('run', path, '--rows', 'dense').startswith('0 of 2 runs are there already')


def test_a_comparison_that_is_not_there(repository, says) -> None:
    assert says('run', 'cifar10_budge.py').endswith("No such file or directory: 'cifar10_budge.py'")
