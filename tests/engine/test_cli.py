"""The command line from end to end, on the embedded digits and a model of a few hundred weights."""

import argparse
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.runner.checkpoint import _load_checkpoint
from torch.multiprocessing import ProcessExitedException

from vqmoe_vision.engine import cli, optim
from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.cli import load_config, run, train
from vqmoe_vision.engine.optim import suit_card, use_amp

from .. import cases, refused
from ..forked import spawn
from ..rows import CONFIGS
from ..runs import reports

DIGITS = Path(__file__).parents[2] / 'configs/classification/digits/demo/vit_tiny_vqmoe_demo.py'
TINY = f"""
_base_ = {str(DIGITS)!r}
experiment_name = NAME  # mmengine keeps one logger per name in a process
model = dict(
    patch_size=16, embed_dim=12, depth=2, num_heads=3, drop_path_rate=0.2, moe=dict(num_experts=2)
)
train_dataloader = dict(batch_size=60, dataset=dict(imbalance=100))  # 309 images
train_cfg = dict(max_epochs=2, val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2))
"""


@pytest.fixture
def config(tmp_path, request) -> str:
    path = tmp_path / 'tiny.py'
    path.write_text(TINY.replace('NAME', repr(request.node.name)))
    return str(path)


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('trained')
    path = folder / 'tiny.py'
    path.write_text(TINY.replace('NAME', repr(f'trained {folder}')))
    train([str(path), '--work-dir', str(folder / 'run')])
    return folder / 'run'


def load(path: Path) -> dict:
    return _load_checkpoint(str(path), map_location='cpu')


def equal(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_resumed_run_equals_uninterrupted_run_bit_for_bit(trained, config, tmp_path):
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


@pytest.mark.parametrize('line', ['', "runner_type = 'Runner'\n"])
def test_a_test_leaves_the_config_of_its_run(line, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'run')
    config = tmp_path / 'run/tiny.py'
    config.write_text(
        config.read_text() + f'resume = True\n{line}'
    )  # as one may have been left by a run
    before = config.read_text()
    weights = tmp_path / 'weights.pth'
    torch.save({'state_dict': load(trained / 'epoch_2.pth')['state_dict']}, weights)
    options = (f'experiment_name={tmp_path.name}', 'test_dataloader.batch_size=50')
    args = (str(config), str(weights), '--work-dir', str(tmp_path / 'run'))
    cli.test([*args, '--cfg-options', *options])
    assert config.read_text() == before
    of_test = max(tmp_path.glob('run/*/vis_data/config.py'), key=lambda path: path.stat().st_mtime)
    assert 'batch_size=50' in of_test.read_text()


@cases(
    'saved, option, what',
    ({'ema_state_dict': {}}, 'log_level=INFO', 'EMAHook=False is not possible: True, as wh'),
    ({}, 'default_hooks.ema.type=EMAHook', 'EMAHook=True is not possible: False, as when'),
)
def test_a_run_goes_on_with_averages_if_it_has_them(saved, option, what, trained, config, tmp_path):
    shutil.copytree(trained, tmp_path / 'run')
    content = torch.load(tmp_path / 'run/epoch_2.pth', weights_only=True)
    torch.save({**content, **saved}, tmp_path / 'run/epoch_2.pth')
    options = ['--cfg-options', f'experiment_name={tmp_path.name}', option]
    with pytest.raises(SystemExit, match=what):
        train([config, '--work-dir', str(tmp_path / 'run'), '--resume', *options])


@pytest.mark.parametrize('linked', [False, True])
def test_test_writes_metrics_and_routing(linked, trained, config, tmp_path):
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


@cases(
    'arguments, message',
    (['model.moe.top_k=3', 'model.model_name=vit_tiny_smoe'], 'model.moe.top_k=3 is not'),
    (['model.moe.foo=1'], 'model.moe.foo=1 is not'),
    (['model.moe=None', 'model.moe.top_k=2'], '--cfg-options model.moe model.moe.top_k: '),
    (['model.num_classes=7'], 'model.num_classes=7'),
    (["activation_checkpointing=['model.blocks.1.mlp.router']"], 'activation_checkpointing='),
    (['runner_type=Foo'], "runner_type='Foo' is not"),
    (['optim_wrapper.type=ApexOptimWrapper'], "optim_wrapper.type='ApexOptimWrapper' is not"),
    (['trian_cfg.max_epochs=1'], 'trian_cfg.max_epochs=1 is not'),
    (['default_hooks.loger=None'], 'default_hooks.loger=None is not'),
    (['env_cfg.cudnn_benchmrk=False'], 'env_cfg.cudnn_benchmrk=False is not'),
    (['auto_scale_lr.enabled=True'], 'auto_scale_lr.enabled=True is not'),
    (['compile.mode=max-autotune'], "compile.mode='max-autotune' is not"),
    (["custom_hooks=[{'type': 'EMAHook'}]"], "custom_hooks=['EMAHook'] is not"),
)
def test_mistake_in_options_is_one_line(config, tmp_path, arguments, message):
    command = [config, '--amp', '--work-dir', str(tmp_path / 'w'), '--cfg-options', *arguments]
    assert message in refused('^error: ', train, command, error=SystemExit)
    with pytest.raises(Exception, match=r'.+'):  # and so not SystemExit, which is no Exception
        train([*command, '--debug'])


@cases(
    'option',
    *('model.moe.topp_k=1', 'model.moe.num_experts=0', 'model.img_sizee=3', 'model.moe=all'),
    *('model.model_name=vit_tiny_vqmo', 'train_dataloader.dataset.data_root=nowhere'),
)
def test_a_mistake_in_model_or_data_leaves_nothing(option, config, tmp_path):
    options = ['--cfg-options', 'model.model_name=vit_tiny_smoe', option]
    said = refused(
        '^error', train, [config, '--work-dir', str(tmp_path / 'w'), *options], error=SystemExit
    )
    # the field, and of a typo what was meant
    assert option.partition('=')[0].rpartition('.')[2] in said
    meant = {'topp_k': 'top_k', 'vit_tiny_vqmo': 'vit_tiny_vqmoe'}
    for typo, word in meant.items():
        assert typo not in option or re.search(rf'\b{word}\b', said)
    assert not (tmp_path / 'w').exists()


@cases(
    'arguments, message',
    ([str(CONFIGS / 'comparisons/cifar10_budget.py')], 'model=None is not possible'),
    (['CONFIG', '--launcher', 'pytorch'], "--launcher='pytorch' .* RANK is not set"),
    (['CONFIG', 'none.pth'], "checkpoint 'none.pth' does not exist"),
    (['CONFIG', 'CONFIG', '--out', '.'], r"--out='\.' is not possible: a file"),
    (['CONFIG', 'CONFIG', '--out', 'tiny.py/m.json'], r'folder tiny\.py cannot be written'),
    ids=str,
)
def test_mistake_in_arguments_is_one_line(config, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [config if argument == 'CONFIG' else argument for argument in arguments]
    tool = train if len(command) == 1 or command[1].startswith('-') else cli.test
    refused(f'^error: .*{message}', tool, command, error=SystemExit)


@pytest.mark.parametrize('supported, dtype', [(True, 'bfloat16'), (False, 'float16')])
def test_amp_on_a_gpu_is_bfloat16_where_the_gpu_has_it(config, monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: supported)
    settings = load_config(config, {'optim_wrapper.dtype': None})
    use_amp(settings)
    wrapper = settings.optim_wrapper
    assert (wrapper.type, wrapper.dtype) == ('AmpOptimWrapper', dtype)
    # a loss scale reads back at each step; float16 is lost without one
    assert wrapper.loss_scale == ({'enabled': False} if supported else 'dynamic')


@cases(
    'given, fused, told',
    ({}, True, True),
    ({'type': 'AmpOptimWrapper'}, True, False),
    ({'optimizer.fused': False}, False, True),
    ({'optimizer.foreach': True}, None, True),
    ({'optimizer.type': 'SGD'}, None, True),
)
def test_a_card_gets_what_it_is_better_at_and_a_config_what_it_says(
    config, monkeypatch, given, fused, told
):
    settings = load_config(config, {f'optim_wrapper.{name}': v for name, v in given.items()})
    before = settings.to_dict()
    assert suit_card(settings, 'c.py') == '' and settings.to_dict() == before
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: True)
    line = suit_card(settings, 'c.py')
    assert settings.optim_wrapper.optimizer.get('fused') == fused
    assert ('bfloat16: vqmoe train c.py --amp' in line) == told
    settings = load_config(config, {'parallel': {'param_dtype': 'bfloat16'}})
    assert not suit_card(settings, 'c.py') and 'fused' not in settings.optim_wrapper.optimizer


FOR_GPUS = {'type': 'AmpOptimWrapper', 'loss_scale': 'dynamic', 'dtype': 'float16'}


@pytest.mark.parametrize('options', [{}, FOR_GPUS])
def test_amp_on_a_cpu_takes_a_config_for_a_gpu(config, options, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(optim, 'print_log', lambda line, logger: lines.append(line))
    settings, plain = (
        load_config(config, {f'optim_wrapper.{n}': v for n, v in given.items()})
        for given in (options, {})
    )
    for each in (plain, settings):
        use_amp(each)
    assert settings.optim_wrapper == plain.optim_wrapper
    assert len(lines) == 2 * bool(options) and all('is for CUDA' in line for line in lines)
    build_optim_wrapper(torch.nn.Linear(1, 1), settings.optim_wrapper)


AVERAGES = ['default_hooks.ema.type=EMAHook', 'default_hooks.ema.momentum=0.001']
CODES = 'model.blocks.1.mlp.quantizer.codebook.'


def averaged(config: str, folder: Path, book: str, *more: str) -> dict[str, Any]:
    options = [*AVERAGES, f'model.moe.codebook={book}', f'experiment_name={folder.name}-{folder}']
    train([config, '--work-dir', str(folder), *more, '--cfg-options', *options])
    return read_content(str(folder / 'epoch_2.pth'))


@pytest.mark.parametrize('book', ['ema', 'cvq'])
def test_a_run_with_averages_resumes_exactly(book, config, tmp_path):
    """Codes that statistics move are copied; codes that are weights are averaged."""
    whole, folder = averaged(config, tmp_path / 'whole', book), tmp_path / 'resumed'
    one, other = (
        {n: v for n, v in whole[of].items() if n.startswith(f'{prefix}{CODES}')}
        for of, prefix in (('state_dict', ''), ('ema_state_dict', 'module.'))
    )
    embed, trained = one[f'{CODES}embed'], other[f'module.{CODES}embed']
    if book == 'ema':
        equal(list(one.values()), list(other.values()))
        assert one[f'{CODES}updates'] == whole['meta']['iter']
    else:  # the random codes before k-means are no longer than a tenth of a token
        assert 0 < (embed - trained).norm() < 0.3 * trained.norm()
    folder.mkdir()
    shutil.copy(tmp_path / 'whole/epoch_1.pth', folder)
    resumed = averaged(config, folder, book, '--resume')
    for part in ('state_dict', 'ema_state_dict'):
        equal(resumed[part], whole[part])


def prints(length: int, _: argparse.Namespace) -> None:
    print('-' * length)


def tool(_rank: int, action: Callable[[argparse.Namespace], None], errors: Path) -> None:
    parser = argparse.ArgumentParser()
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    run(parser, [], action)


@pytest.mark.parametrize('length', [1, 100_000], ids=['as_it_ends', 'as_it_prints'])
def test_a_tool_whose_output_is_read_no_more_ends_as_others_do(length, tmp_path):
    with pytest.raises(ProcessExitedException) as ended:
        spawn(tool, (partial(prints, length), tmp_path / 'errors'), 1)
    assert ended.value.exit_code == -signal.SIGPIPE
    assert (tmp_path / 'errors').read_text() == ''


SHORT = 'model.depth=2 model.embed_dim=12 model.patch_size=16 train_cfg.max_epochs=1 '
SHORT += 'train_cfg.val_interval=1 train_dataloader.batch_size=150 '
SHORT += 'train_dataloader.dataset.imbalance=100'


@pytest.mark.filterwarnings('ignore:Detected call of .scheduler:UserWarning')
@pytest.mark.parametrize('choice', ['bar', 'plain', None])
def test_a_terminal_shows_a_bar_and_a_file_every_line(choice, tmp_path, capsys):
    twice = 'optim_wrapper.accumulative_counts=2'
    options = ['--cfg-options', *SHORT.split(), twice, f'experiment_name=terminal_{choice}']
    asked = [] if choice is None else ['--log', choice]  # what is no terminal is plain
    run = tmp_path / 'run'
    cli.train([str(DIGITS), '--work-dir', str(run), *asked, *options])
    shown = capsys.readouterr().out
    assert ' 300 images: 1 processes x 150 images x 2 batches' in shown
    assert 'Training vit_tiny_vqmoe (' in shown and 'on digits (309 images): 1 epochs' in shown
    assert f'last {run}/epoch_1.pth' in shown and 'Trained, accuracy/top1 ' in shown
    bar = choice == 'bar'
    assert ('| 2/2 [' in shown and ', loss ' in shown) == bar
    assert 'Config:' not in shown  # which the file has
    assert ('Epoch(val) [1][1/1]' in shown) != bar
    (log,) = run.glob('*/*.log')
    assert 'Config:' in log.read_text()
    assert any('Epoch(val)' in line for line in reports(run))
    tested = ['--work-dir', str(run), *asked, *options[:-1], f'experiment_name=test_{choice}']
    cli.test([str(DIGITS), str(run / 'epoch_1.pth'), *tested])
    assert 'Tested  accuracy/top1 ' in capsys.readouterr().out
