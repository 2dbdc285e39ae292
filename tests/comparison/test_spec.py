"""What a comparison may say of itself, and that those of the repository can be built."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from mmengine.registry import MODELS, DefaultScope

import vqmoe_vision.classification
import vqmoe_vision.segmentation  # noqa: F401  both register models
from vqmoe_vision.comparison.figures import curve_styles
from vqmoe_vision.comparison.queue import tasks_of
from vqmoe_vision.comparison.spec import CONTROLS, FEATURE_ROWS, ROWS, START, read_comparison
from vqmoe_vision.comparison.store import Run, Store
from vqmoe_vision.engine.model import without_sources
from vqmoe_vision.models.moe_vit import complexity
from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe.layer import MoeLayer

from .. import cases, on_meta
from ..rows import CONFIGS

SPECS = sorted(CONFIGS.glob('comparisons/*.py'))
BUILT: set[str] = set()  # models that a row was seen to be
# Options that rows of finished comparisons had: they can be read, and not be trained again.
GONE = ('ema_decay_warmup', 'ema_bias_correction', 'usage_from_kmeans', 'codebook=gradient')


@pytest.fixture
def root(monkeypatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)


@pytest.mark.parametrize('path', SPECS, ids=lambda path: path.stem)
def test_every_row_of_every_comparison_can_be_built(path, root):
    comparison = read_comparison(str(path))
    for row in comparison.rows:
        run = Run(comparison, row, comparison.seeds[0], Path('work_dirs'))
        config = run.merged()
        own = [option for option in run.options if any(gone in option for gone in GONE)]
        refused = pytest.raises((TypeError, ValueError)) if own else nullcontext()
        model = config.model.get('backbone', config.model)
        if (key := repr(model)) not in BUILT:  # budgets differ, and rows are the same
            scope = DefaultScope.overwrite_default_scope(config.default_scope)
            with refused, on_meta(), scope:
                MODELS.build(model)
            BUILT.add(key)
        assert config.default_hooks.record.type == 'RunRecordHook'
    for shown in (comparison, replace(comparison, highlighted=())):
        looks = [(s['color'], str(s['linestyle'])) for s in curve_styles(shown).values()]
        assert len({*looks}) == len(looks) == len(shown.highlighted or shown.rows)


ADE = 'segmentation/ade20k/segmenter_vit-s-vqmoe{}_mask_8xb1-160k_ade20k-512x512.py'


@cases(
    'leaf, pretrained',
    ('classification/cifar100.py', False),
    ('classification/finetune/imagenette.py', True),
    (ADE.format(''), False),
    (ADE.format('-in21k-pre'), True),
)
def test_a_config_is_a_comparison_of_all_rows(leaf, pretrained, root):
    comparison = read_comparison(f'configs/{leaf}')
    assert comparison.name == '-'.join(Path(leaf).with_suffix('').parts[-2:])
    theirs = {'dense_2x'} if pretrained else set()  # whose weights fit none
    assert comparison.rows.keys() == {*ROWS, *CONTROLS} - theirs
    assert comparison.contrasts[0] == 'smoe - smoe_frozen'
    assert comparison.also == (('aAcc', 'mAcc') if 'segmentation' in leaf else ())
    assert len(comparison.seeds) == 5
    assert comparison.metric == ('mIoU' if 'segmentation' in leaf else 'accuracy/top1')
    if not pretrained:
        size = 'small' if 'vit-s' in leaf else 'tiny'
        assert f'model_name=vit_{size}_smoe' in ' '.join(comparison.rows['smoe'])
    for row in comparison.rows if pretrained else ():
        run = Run(comparison, row, 1, Path('work_dirs'))
        own, model = (c.model.get('backbone', c.model) for c in (comparison.base, run.merged()))
        method = row.partition('_')[0].replace('position', 'hashmoe')
        # a model of timm stays, with its weights
        assert (model.model_name, model.pretrained) == (own.model_name, True)
        assert (model.moe and model.moe.method) == (None if row == 'dense_1x' else method)
        scope = DefaultScope.overwrite_default_scope(comparison.base.default_scope)
        with on_meta(), scope:
            built = MODELS.build(without_sources(model))
        assert any(isinstance(part, MoeLayer) for part in built.modules()) == (row != 'dense_1x')


@cases(
    'name, options, of_all_rows, moe_blocks',
    ('vit_tiny_vqmoe', dict(moe=dict()), ['model.depth=6'], 3),  # every second block
    ('vit_tiny_vqmoe', dict(depth=4, moe=dict(moe_layers=[0])), [], 1),
    ('vit_tiny_patch16_224', dict(moe=dict(method='vqmoe')), [], 6),
)
def test_dense_2x_has_the_compute_of_two_experts(name, options, of_all_rows, moe_blocks, tmp_path):
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
        with on_meta(), DefaultScope.overwrite_default_scope(config.default_scope):
            macs[row] = complexity(MODELS.build(config.model).model).macs
    # a router has a product with 8 vectors, where an MLP of width 192 has 2 x 768
    assert macs['smoe'] == pytest.approx(macs['dense_2x'], rel=0.01)
    assert macs['dense_2x'] > 1.05 * macs['dense_1x']


def test_options_of_the_row_win_over_the_budget(spec):
    own = 'smoe train_cfg.max_iters=9 model.moe.moe_layers="(1, 3)"'
    comparison = read_comparison(spec("options = ['train_cfg.max_iters=7']", own=own))
    run, other = (Run(comparison, row, 2, Path('work')) for row in ('own', 'dense'))
    assert run.resolved['train_cfg']['max_iters'] == 9
    assert run.resolved['model']['moe']['moe_layers'] == [1, 3]
    assert run.resolved['randomness'] == {'seed': 2}
    assert other.resolved['train_cfg']['max_iters'] == 7
    # nor does another budget ever resume the checkpoints of this one
    longer = read_comparison(spec("options = ['train_cfg.max_iters=8']"))
    assert len({each.folder for each in (run, other, Run(longer, 'dense', 2, Path('work')))}) == 3


def test_rows_follow_the_table_of_methods(spec):
    more = 'all_methods = True\nall_presets = True'
    rows = read_comparison(spec(more, more_experts='smoe model.moe.num_experts=16')).rows
    differing = {
        f'{name}_{preset}'.replace('hashmoe', 'position')
        for name, method in METHODS.items()
        for preset in method.config.PRESETS
        if method.config.from_options(preset=preset) != method.config.from_options(preset='matched')
    }
    assert rows.keys() == {*ROWS, 'dense', 'more_experts'} | differing
    assert rows['more_experts'][-1] == 'model.moe.num_experts=16'
    assert rows['smoe_frozen'][-1] == 'model.moe.preset=frozen'
    # a preset's own number of experts stays
    assert not any('num_experts' in option for option in rows['smoe_fine'])


def test_a_row_may_start_from_one_of_its_own_comparison(spec):
    given = "start = 'spec.py dense iter_2.pth'"
    comparison = read_comparison(spec(given, own='tgrmoe model.features={start}'))
    store = Store(Path('rows/spec'))
    own, found = (Run(comparison, row, 2, Path('work')) for row in ('dense', 'own'))
    source, checkpoint = found.sources[START]
    assert source.key == own.key and checkpoint == own.folder / 'iter_2.pth'
    assert found.resolved['model']['features'] == str(checkpoint)
    (alone,) = tasks_of([own], store)
    first, second = tasks_of([own, found], store)
    assert first.run.folder == alone.run.folder == own.folder and first.leaves == checkpoint
    assert second.run is found


def test_rows_that_start_from_another_run_take_it_at_their_seed(spec):
    Path('first.py').write_text(Path(spec(other='smoe')).read_text())
    given = "start = 'first.py dense iter_2.pth'\nall_methods = True\nall_started = True"
    comparison = read_comparison(spec(given, a='smoe model.checkpoint={start:other}'))
    started = {f'{row}_started' for row in (*ROWS, *FEATURE_ROWS) if row != 'dense_2x'}
    assert comparison.rows.keys() == {'dense', 'a', *ROWS, *FEATURE_ROWS} | started
    first = read_comparison('first.py')
    dense, other = (Run(first, row, 2, Path('work')) for row in ('dense', 'other'))
    run = Run(comparison, 'smoe_started', 2, Path('work'))
    file = dense.folder / 'iter_2.pth'
    assert run.resolved['model']['checkpoint'] == str(file) == str(run.sources['{start}'][1])
    assert Run(comparison, 'dense', 2, Path('work')).sources == {}
    assert Run(comparison, 'a', 2, Path('work')).sources['{start:other}'][0] == other
    for row in FEATURE_ROWS:
        assert Run(comparison, row, 2, Path('work')).resolved['model']['features'] == str(file)


FROM = "start = 'first.py dense a.pth'\n"


@cases(
    'more, field',
    ("start = 'dense'", 'start='),
    ("start = 'other.py dense iter_2.pth'", 'spec.py: start='),
    ("rows['a'] = 'smoe model.checkpoint={start}'", 'needs the field start'),
    (f"{FROM}options = ['model.checkpoint={{start}}']", 'options='),
    (f"{FROM}rows['a'] = 'smoe a={{start:b-c}}'", 'row b-c does not exist'),
    ("all_methods = True\nrows = dict(smoe='vqmoe')", "rows ['smoe']"),
    ("all_methods = 'False'", 'all_methods='),
    ('seeds = [1, 1]', 'seeds='),
    ("rows['lr/2'] = 'smoe'", "row='lr/2'"),
    ("rows['one'] = 'smoke'", "row='smoke'"),
    ("rows['one'] = 'dense_1x a=\\'1'", 'rows.one='),
    ("rows['one'] = 'dense_1x optimiser.lr=3'", 'optimiser.lr=3'),
    ("rows['one'] = 'smoe model.moe.absent=1'", 'row one: model.moe.absent=1'),
    ("options = ['randomness.seed=3']", 'randomness.seed=3'),
    ("shifts = dict(a='train_cfg.max_iters=1')", 'shifts.a='),
    ("stage = 'dev'\nshifts = dict(a='model.b=1')", 'shifts='),
    ("contrasts = ['dense - smoke']", 'row smoke does not exist'),
    ('margin = -1.0', 'margin='),
    ("budget = 'long'", "fields ['budget']"),
    ('rows = dict(', 'spec.py, line 5'),
)
def test_mistakes_are_one_line_and_start_no_run(spec, says, more, field):
    Path('first.py').write_text(Path(spec()).read_text())
    # two that start from each other
    Path('other.py').write_text(Path(spec("start = 'spec.py dense iter_2.pth'")).read_text())
    line = says('run', spec(more))
    assert line.startswith('error: ') and field in line and '\n' not in line
    assert not Path('calls').exists()


@cases(
    'config, said',
    ('classification/finetune/imagenette.py', 'extra_mlps=2'),
    ('classification/test_vit.py', "model.model_name='test_vit_vqmoe'"),
    ('classification/imagenet/vit_tiny_dense_imagenet.py', 'model.moe=None'),
)
def test_models_that_rows_cannot_be_made_of(says, root, tmp_path, config, said):
    fields = "metric = 'a'\nseeds = [1]\nrows = dict(dense_2x='dense_2x', smoe='smoe')\n"
    (tmp_path / 'own.py').write_text(f"config = 'configs/{config}'\n{fields}")
    folders = ['--work-dir', str(tmp_path), '--results', str(tmp_path)]
    assert said in says('run', str(tmp_path / 'own.py'), *folders)
