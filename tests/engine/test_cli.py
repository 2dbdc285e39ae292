"""The command line from end to end, on the embedded digits and a model of a few hundred weights."""

import errno
import json
import re
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint

from vqmoe_vision.engine import NonFiniteError, cli, optim
from vqmoe_vision.engine.cli import load_config, train
from vqmoe_vision.engine.command import one_line
from vqmoe_vision.engine.optim import use_amp

from ..logs import reports
from ..rows import CONFIGS

DIGITS = Path(__file__).parents[2] / 'configs/classification/digits/demo/vit_tiny_vqmoe_demo.py'
TINY = f"""
_base_ = {str(DIGITS)!r}
experiment_name = NAME  # mmengine keeps one logger per name in a process
model = dict(
    patch_size=16, embed_dim=12, depth=2, num_heads=3, drop_path_rate=0.2, moe=dict(num_experts=2)
)
train_dataloader = dict(batch_size=240)
train_cfg = dict(max_epochs=2, val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2))
"""


@pytest.fixture
def config(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    path = tmp_path / 'tiny.py'
    path.write_text(TINY.replace('NAME', repr(request.node.name)))
    return str(path)


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work dir of an uninterrupted run of two epochs."""
    folder = tmp_path_factory.mktemp('trained')
    path = folder / 'tiny.py'
    path.write_text(TINY.replace('NAME', repr(f'trained {folder}')))
    train([str(path), '--work-dir', str(folder / 'run')])
    return folder / 'run'


def load(path: Path) -> dict:
    return _load_checkpoint(str(path), map_location='cpu')


def equal(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_training_leaves_last_and_best_checkpoint_and_logs(trained: Path) -> None:
    assert (trained / 'last_checkpoint').read_text().endswith('epoch_2.pth')
    assert len(list(trained.glob('best_accuracy_top1_epoch_*.pth'))) == 1
    (scalars,) = trained.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in scalars.read_text().splitlines()]
    names = set().union(*records)
    layer = 'blocks.1.mlp'
    assert {'loss', 'cross_entropy_loss', 'accuracy/top1', 'accuracy/top5'} <= names
    assert {f'{layer}/balance_loss', f'{layer}/load_max', f'{layer}/code_usage_perplexity'} <= names
    for part in ('train_epoch', 'val'):
        assert {f'{part}/{layer}/load_unused', f'{part}/{layer}/code_usage_perplexity'} <= names
    assert list(trained.glob('*/vis_data/events.out.tfevents*'))


def test_training_starts_from_the_weights_of_another_run(
    trained: Path, config: str, tmp_path: Path
) -> None:
    options = [f'model.checkpoint={trained / "epoch_2.pth"}', 'train_cfg.max_epochs=1']
    train([config, '--work-dir', str(tmp_path / 'w'), '--cfg-options', *options])
    (log,) = (tmp_path / 'w').glob('*/*.log')
    assert 'epoch_2.pth: the head is the one of the checkpoint' in log.read_text()


def test_log_shows_time_left_and_one_report_per_layer_and_epoch(trained: Path) -> None:
    told = reports(trained)
    steps = [report for report in told if 'Epoch(train)' in report]
    assert steps and all('eta: ' in step and 'blocks.' not in step for step in steps)
    assert not any('base_lr' in step for step in steps)  # as `lr`
    assert len([r for r in told if re.search(r'train_epoch  blocks.1.mlp\s+load ', r)]) == 2
    assert all(len(line) <= 100 for report in told for line in report.splitlines())


def test_resumed_run_equals_uninterrupted_run_bit_for_bit(
    trained: Path, config: str, tmp_path: Path
) -> None:
    work_dir = tmp_path / 'resumed'
    work_dir.mkdir()
    shutil.copy(trained / 'epoch_1.pth', work_dir)
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_1.pth'))
    train([config, '--work-dir', str(work_dir), '--resume'])
    resumed, whole = load(work_dir / 'epoch_2.pth'), load(trained / 'epoch_2.pth')
    first = load(trained / 'epoch_1.pth')['state_dict']
    assert any('codebook' in name for name in whole['state_dict'])
    assert any(not torch.equal(whole['state_dict'][name], first[name]) for name in first)
    equal(resumed['state_dict'], whole['state_dict'])
    equal(resumed['optimizer']['state'], whole['optimizer']['state'])
    assert resumed['param_schedulers'] == whole['param_schedulers']


def test_a_run_that_is_complete_says_so(
    trained: Path, config: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    shutil.copytree(trained, tmp_path / 'run')
    message = 'Nothing is left to train: train_cfg.max_epochs={} is reached'
    for epochs in (2, 3):
        # mmengine keeps one logger per name in a process
        name = f'experiment_name={tmp_path.name}-{epochs}'
        more = ['--cfg-options', name, f'train_cfg.max_epochs={epochs}']
        train([config, '--work-dir', str(tmp_path / 'run'), '--resume', *more])
        out = ''.join(capfd.readouterr())
        assert (message.format(epochs) in out) == (epochs == 2)
    assert (tmp_path / 'run/epoch_3.pth').is_file()


def test_what_goes_on_says_what_it_began_with(trained: Path, config: str, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / 'run')
    (tmp_path / 'run/epoch_2.pth').unlink()
    name = f'experiment_name={tmp_path.name}'
    train([config, '--work-dir', str(tmp_path / 'run'), '--resume', '--cfg-options', name])
    after = Config.fromfile(tmp_path / 'run/tiny.py')
    assert (tmp_path / 'run/epoch_2.pth').is_file()
    assert 'load_from' not in after and 'resume' not in after


@pytest.mark.parametrize('line', ['', "runner_type = 'Runner'\n"])
def test_a_test_leaves_the_config_of_its_run(line: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / 'run')
    config = tmp_path / 'run/tiny.py'
    config.write_text(
        config.read_text() + f'resume = True\n{line}'
    )  # as one may have been left by a run
    before = config.read_text()
    # weights alone, of which nothing can go on
    weights = tmp_path / 'weights.pth'
    torch.save({'state_dict': load(trained / 'epoch_2.pth')['state_dict']}, weights)
    options = (f'experiment_name={tmp_path.name}', 'test_dataloader.batch_size=50')
    args = (str(config), str(weights), '--work-dir', str(tmp_path / 'run'))
    cli.test([*args, '--cfg-options', *options])
    assert config.read_text() == before
    of_test = max(tmp_path.glob('run/*/vis_data/config.py'), key=lambda path: path.stat().st_mtime)
    assert 'batch_size=50' in of_test.read_text()


@pytest.mark.parametrize(
    ('saved', 'option', 'what'),
    [
        ({'ema_state_dict': {}}, 'log_level=INFO', 'has averages of its weights, .* no EMAHook'),
        ({}, 'default_hooks.ema.type=EMAHook', 'has no averages of its weights, .* an EMAHook'),
    ],
)
def test_a_run_goes_on_with_averages_if_it_has_them(
    saved: dict, option: str, what: str, trained: Path, config: str, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / 'run')
    content = torch.load(tmp_path / 'run/epoch_2.pth', weights_only=True)
    torch.save({**content, **saved}, tmp_path / 'run/epoch_2.pth')
    options = ['--cfg-options', f'experiment_name={tmp_path.name}', option]
    with pytest.raises(SystemExit, match=f'{what}: go on with the options that it began with'):
        train([config, '--work-dir', str(tmp_path / 'run'), '--resume', *options])


def test_codebook_moves_between_epochs(trained: Path) -> None:
    before, after = (load(trained / f'epoch_{i}.pth')['state_dict'] for i in (1, 2))
    codes = [name for name in after if name.endswith('codebook.embed')]
    assert codes
    assert all(not torch.equal(before[name], after[name]) for name in codes)


@pytest.mark.parametrize('linked', [False, True])
def test_test_writes_metrics_and_routing(
    linked: bool, trained: Path, config: str, tmp_path: Path
) -> None:
    out = tmp_path / ('link.json' if linked else 'new/metrics.json')
    work = str(tmp_path / 'run')
    if linked:  # as /dev/stdout is one
        out.symlink_to(tmp_path / 'target.json')
    cli.test([config, str(trained / 'epoch_2.pth'), '--out', str(out), '--work-dir', work])
    assert out.is_symlink() == linked
    metrics = json.loads(out.read_text())
    assert 0 <= metrics['accuracy/top1'] <= metrics['accuracy/top5'] <= 100
    assert metrics['blocks.1.mlp/load_unused'] in (0, 1)
    assert 1 <= metrics['blocks.1.mlp/code_usage_perplexity'] <= 2


def test_a_place_for_the_metrics_that_is_none_is_refused_before_the_test(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runner, 'from_cfg', lambda config: pytest.fail('the test begins'))
    (tmp_path / 'file').touch()
    for out, said in (
        (tmp_path, f"--out='{tmp_path}' is not possible: a file, and this is a folder"),
        (tmp_path / 'file/m.json', f'folder {tmp_path / "file"} cannot be written: '),
    ):
        with pytest.raises(SystemExit, match=f'^error: {re.escape(said)}'):
            cli.test([config, config, '--out', str(out), '--work-dir', str(tmp_path / 'run')])


@HOOKS.register_module()
class ComputedHook(Hook):
    """Keeps the dtypes in which a training computes."""

    found: ClassVar[set[torch.dtype]] = set()

    def before_train(self, runner: Runner) -> None:
        runner.model.model.head.register_forward_hook(self.keep)

    @classmethod
    def keep(cls, head: torch.nn.Module, _: object, scores: torch.Tensor) -> None:
        if head.training:
            cls.found.add(scores.dtype)


@pytest.mark.parametrize('amp', [True, False])
def test_mixed_precision_trains_on_the_cpu(config: str, tmp_path: Path, amp: bool) -> None:
    ComputedHook.found.clear()
    options = ['--cfg-options', 'train_cfg.max_epochs=1', 'default_hooks.seen.type=ComputedHook']
    train([config, *['--amp'] * amp, '--work-dir', str(tmp_path / 'amp'), *options])
    assert ComputedHook.found == {torch.bfloat16 if amp else torch.float32}
    state = load(tmp_path / 'amp' / 'epoch_1.pth')['state_dict']
    assert state['model.head.weight'].dtype == torch.float32


@HOOKS.register_module()
class TeacherHook(Hook):
    """Stands for a model whose `loss` has names with a slash of its own."""

    priority = 'HIGHEST'

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        outputs |= {'teacher/kd_loss': torch.tensor(0.3), 'acc/top1': torch.tensor(12.0)}


def test_lines_sum_over_layers_with_experts_alone(config: str, tmp_path: Path) -> None:
    options = ['train_cfg.max_epochs=1', 'default_hooks.teacher.type=TeacherHook']
    options += ['default_hooks.logger.interval=5', 'log_processor.log_with_hierarchy=True']
    train([config, '--work-dir', str(tmp_path / 'run'), '--cfg-options', *options])
    (line,) = (text for text in reports(tmp_path / 'run') if 'Epoch(train)' in text)
    assert 'teacher/kd_loss: 0.3000' in line and 'acc/top1: 12.0000' in line
    assert 'moe/kd_loss' not in line
    assert 'moe/balance_loss: ' in line and 'blocks.' not in line


@HOOKS.register_module()
class SpoilHook(Hook):
    def before_train_epoch(self, runner: Runner) -> None:
        if runner.epoch == 1:
            runner.model.model.blocks[0].mlp.fc1.weight.data.fill_(torch.nan)


def test_loss_that_becomes_nan_stops_and_leaves_the_last_good_checkpoint(
    config: str, tmp_path: Path
) -> None:
    with open(config, 'a') as file:
        file.write("custom_hooks = [*_base_.custom_hooks, dict(type='SpoilHook')]\n")
    work_dir = tmp_path / 'nan'
    with pytest.raises(SystemExit, match=r'^error: blocks\.1\.mlp/\w+ became nan at iteration 6 '):
        train([config, '--work-dir', str(work_dir)])
    assert (work_dir / 'last_checkpoint').read_text().endswith('epoch_1.pth')
    assert all(v.isfinite().all() for v in load(work_dir / 'epoch_1.pth')['state_dict'].values())


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['model.moe.top_k=3', 'model.model_name=vit_tiny_smoe'], 'top_k=3'),
        (['model.top_k=3', 'model.model_name=vit_tiny_smoe'], 'top_k=3'),
        (['model.num_experts=4'], 'num_experts=4 is not possible: moe.num_experts=2 is set'),
        (['model.moe.top_k=2'], 'moe.top_k=2 is not possible: the options are'),
        (['model.moe.foo=1'], 'moe.foo=1 is not possible: the options are'),
        (
            ['model.model_name=vit_tiny_patch16_224'],
            'moe.method=None is not possible: one of',
        ),
        (
            ['model.moe=None', 'model.moe.top_k=2'],
            '--cfg-options model.moe model.moe.top_k: ',
        ),
        (['model.embed_dim.top_k=2'], "embed_dim={'top_k': 2}"),
        (['model.extra_mlps=2'], 'extra_mlps=2 is not possible: 0, vit_tiny_vqmoe is no dense'),
        (['model.num_heads=5'], 'dim should be divisible by num_heads'),
        (['model.patch_size=5'], 'img_size=48 is not possible: a multiple of patch_size=5x5'),
        (['model.num_classes=7'], 'model.num_classes=7, but the data set has 10 classes'),
        (['model.number_experts=2'], 'number_experts'),
        (
            ['activation_checkpointing=model.blocks'],
            "activation_checkpointing='model.blocks' is not possible: modules without MoE layers",
        ),
        (
            ["activation_checkpointing=['model.blocks.0','model.blocks.1.mlp.router']"],
            "activation_checkpointing='model.blocks.1.mlp.router' is not possible: modules without",
        ),
        (['trian_cfg.max_epochs=1'], 'trian_cfg.max_epochs=1 is not possible: a field of '),
        (['max_epochs'], '--cfg-options max_epochs: write it as name=value'),
        (
            ['default_hooks.loger=None'],
            'default_hooks.loger=None is not possible',
        ),
        (['env_cfg.cudnn_benchmrk=False'], 'env_cfg.cudnn_benchmrk=False is not possible: it has'),
        (['auto_scale_lr.enabled=True'], 'auto_scale_lr.enabled=True is not possible: it has'),
        (['compile.mode=max-autotune'], "compile.mode='max-autotune' is not possible: one without"),
        (['train_cfg.max_epoch=1'], 'max_epoch'),
        (
            ['default_hooks.logger.type=LoggerHook', 'default_hooks.ema.type=EMA'],
            'EMA is not in the',
        ),
        (
            ['train_dataloader.dataset.type=class_folder', 'train_dataloader.dataset.data_root=no'],
            'no/train is not laid out as no/train/<class name>/<image>',
        ),
    ],
)
def test_mistake_in_options_is_one_line(
    config: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    command = [config, '--work-dir', str(tmp_path / 'w'), '--cfg-options', *arguments]
    with pytest.raises(SystemExit) as caught:
        train(command)
    text = caught.value.code
    assert isinstance(text, str)  # which python prints, and exits with 1
    assert text.startswith('error: ') and message in text and '\n' not in text
    with pytest.raises(Exception, match=r'.+'):  # and so not SystemExit, which is no Exception
        train([*command, '--debug'])


def test_missing_module_is_named(config: str) -> None:
    with open(config, 'a') as file:
        file.write("custom_imports = dict(imports=['no_such'], allow_failed_imports=False)\n")
    with pytest.raises(SystemExit, match=r"^error: No module named 'no_such'$"):
        train([config])


def test_missing_config() -> None:
    with pytest.raises(SystemExit, match=r"^error: .*No such file or directory: 'none.py'$"):
        train(['none.py'])


@pytest.mark.parametrize('leaf', ['_base_/datasets/recipe.py', 'comparisons/cifar10_budget.py'])
@pytest.mark.parametrize('others', [[], ['none.pth']])
def test_a_config_without_a_model(others: list[str], leaf: str) -> None:
    config = str(CONFIGS / leaf)
    tool = cli.test if others else train
    with pytest.raises(SystemExit) as caught:
        tool([config, *others])
    assert str(caught.value).startswith(f'error: config {config!r} has no model: it is a part of')


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('model.moe.num_expert=4', r'^error: model\.moe\.num_expert=4 is not possible: the op'),
        ('model.moe.num_experts=0', r'^error: model\.moe\.num_experts=0 is not possible: at least'),
        ('model.model_name=vit_tiny_vqmo', r"^error: model\.model_name='vit_tiny_vqmo' is not a"),
        ('runner_type=Foo', r"^error: runner_type='Foo' is not possible: .*, which are .*Runner$"),
    ],
)
def test_a_mistake_in_an_option_names_it_as_it_was_typed(
    config: str, tmp_path: Path, option: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        train([config, '--work-dir', str(tmp_path), '--cfg-options', option])


def test_launcher_without_torchrun(config: str) -> None:
    with pytest.raises(SystemExit, match=r"^error: --launcher='pytorch' .* RANK is not set"):
        train([config, '--launcher', 'pytorch'])


def test_resume_without_a_checkpoint_does_not_start_again(config: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r'--resume finds no checkpoint in .*empty'):
        train([config, '--work-dir', str(tmp_path / 'empty'), '--resume'])


def test_missing_checkpoint(config: str) -> None:
    with pytest.raises(SystemExit, match=r"^error: checkpoint 'none.pth' does not exist$"):
        cli.test([config, 'none.pth'])


def test_checkpoint_that_does_not_fit(trained: Path, config: str, tmp_path: Path) -> None:
    options = ['--work-dir', str(tmp_path / 'w'), '--cfg-options', 'model.embed_dim=24']
    with pytest.raises(SystemExit) as caught:
        cli.test([config, str(trained / 'epoch_2.pth'), *options])
    text = str(caught.value.code)
    assert text.startswith('error: the checkpoint does not fit the model: shapes: model.pos_embed')
    assert 'is (1, 9, 12), the model has (1, 9, 24)' in text and '\n' not in text


@pytest.mark.parametrize('cut_off', [True, False])
def test_damaged_checkpoint(trained: Path, config: str, tmp_path: Path, cut_off: bool) -> None:
    path = tmp_path / 'damaged.pth'
    path.write_bytes((trained / 'epoch_2.pth').read_bytes()[:9000] if cut_off else b'no weights')
    with pytest.raises(SystemExit, match=r"^error: checkpoint '\S+\.pth' is damaged"):
        cli.test([config, str(path), '--work-dir', str(tmp_path / 'w')])


def test_checkpoint_with_code_in_it_is_not_run(config: str, tmp_path: Path) -> None:
    torch.save({'state_dict': {}, 'code': test_damaged_checkpoint}, tmp_path / 'code.pth')
    with pytest.raises(SystemExit, match='holds more than weights'):
        cli.test([config, str(tmp_path / 'code.pth'), '--work-dir', str(tmp_path / 'w')])


def test_work_dir_precedence(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Runner, 'from_cfg', lambda c: used.append(c.work_dir))
    monkeypatch.setattr('sys.exit', lambda _: None)  # there is no runner to train
    train([config])
    train([config, '--cfg-options', 'work_dir=b'])
    train([config, '--work-dir', 'c', '--cfg-options', 'work_dir=b'])
    assert used == [str(Path('work_dirs/tiny')), 'b', 'c']


@pytest.mark.parametrize('options', [{}, {'optim_wrapper.dtype': None}])
@pytest.mark.parametrize(('supported', 'dtype'), [(True, 'bfloat16'), (False, 'float16')])
def test_amp_on_a_gpu_is_bfloat16_where_the_gpu_has_it(
    config: str, monkeypatch: pytest.MonkeyPatch, supported: bool, dtype: str, options: dict
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: supported)
    settings = load_config(config, options)
    use_amp(settings)
    assert settings.optim_wrapper.type == 'AmpOptimWrapper'
    assert settings.optim_wrapper.dtype == dtype
    # a loss scale reads back at each step; float16 is lost without one
    assert settings.optim_wrapper.loss_scale == ({'enabled': False} if supported else 'dynamic')


@pytest.mark.parametrize(
    ('options', 'told'),
    [
        ({}, False),
        ({'dtype': 'bfloat16'}, False),
        ({'dtype': 'float16'}, True),
        ({'type': 'AmpOptimWrapper', 'loss_scale': 'dynamic', 'dtype': 'float16'}, True),
        ({'type': 'AmpOptimWrapper', 'loss_scale': 'dynamic'}, True),
        ({'use_fsdp': False, 'dtype': 'bfloat16'}, True),
    ],
)
def test_amp_on_a_cpu_takes_a_config_for_a_gpu(
    config: str, options: dict, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(optim, 'print_log', lambda line, logger: lines.append(line))
    settings = load_config(config, {f'optim_wrapper.{name}': v for name, v in options.items()})
    plain = load_config(config)
    for each in (plain, settings):
        use_amp(each)
    assert settings.optim_wrapper == plain.optim_wrapper
    given = ', '.join(
        f'optim_wrapper.{n}={v!r}'
        for n, v in sorted(options.items())
        if n != 'type' and v != 'bfloat16'
    )
    line = f'--amp: {given} is for GPUs: bfloat16 without a loss scale on a CPU'
    assert lines == [line] * told
    build_optim_wrapper(torch.nn.Linear(1, 1), settings.optim_wrapper)


def test_amp_refuses_a_wrapper_it_does_not_know(config: str) -> None:
    settings = load_config(config, {'optim_wrapper.type': 'ApexOptimWrapper'})
    with pytest.raises(ValueError, match=r"optim_wrapper.type='ApexOptimWrapper'"):
        use_amp(settings)


@pytest.mark.parametrize(
    ('error', 'text'),
    [
        (ValueError('a is bad'), 'a is bad'),
        (NonFiniteError('x became nan'), 'x became nan'),
        (KeyError('X is not in the registry'), 'KeyError: X is not in the registry'),
        (
            ValueError('class `A` in a/b.py: class `B` in c/d.py: top_k=3 is bad'),
            'top_k=3 is bad',
        ),
        (
            ValueError(
                'Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most '
                'recent call last):\n  File "x.py"\nValueError: a.png cannot be read'
            ),
            'a.png cannot be read',
        ),
        (TypeError('one\n  two'), 'TypeError: one two'),
        (
            OSError(errno.ENOSPC, 'No space left on device'),  # of a log, which names no file
            'No space left on device: free some space; the checkpoints in the work dir are intact',
        ),
    ],
)
def test_one_line(error: Exception, text: str) -> None:
    assert one_line(error) == text
