"""The command line from end to end, on the embedded digits and a model of a few hundred weights."""

import argparse
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch.multiprocessing import ProcessExitedException

from vqmoe_vision.engine import cli, optim
from vqmoe_vision.engine.checkpoint import read_content, read_state
from vqmoe_vision.engine.cli import load_config, run
from vqmoe_vision.engine.optim import suit_card, use_amp
from vqmoe_vision.engine.publish import export, publish

from .. import cases, refused
from ..forked import spawn
from ..rows import CONFIGS
from ..runs import reports, score, train
from ..soak.kinds import same
from .tiny import write_config, write_image


@pytest.fixture
def config(tmp_path) -> str:
    return write_config(tmp_path)


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('trained')
    two = 'default_hooks.checkpoint.max_keep_ckpts=2'
    return train(write_config(folder), folder / 'run', two, 'model.drop_path_rate=0.2')


def test_resumed_run_equals_uninterrupted_run_bit_for_bit(trained, config, tmp_path):
    work = tmp_path / 'resumed'
    work.mkdir()
    shutil.copy(trained / 'epoch_1.pth', work)
    train(config, work, 'model.drop_path_rate=0.2', resume=True)
    files = (work / 'epoch_2.pth', trained / 'epoch_2.pth', trained / 'epoch_1.pth')
    resumed, whole, first = (read_content(str(file)) for file in files)
    assert any('codebook' in name for name in whole['state_dict'])
    assert any(not v.equal(first['state_dict'][n]) for n, v in whole['state_dict'].items())
    for name in ('state_dict', 'optimizer', 'param_schedulers'):
        assert same(resumed[name], whole[name]), name


def test_a_forgotten_resume_leaves_the_earlier_run_as_it_is(trained, config, tmp_path):
    run = shutil.copytree(trained, tmp_path / 'run')
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    with pytest.raises(SystemExit, match=r'--work-dir .*run holds .* --resume'):
        train(config, run)
    after = {path for path in run.rglob('*') if path.is_file()}
    assert after - before.keys() <= {run / '.lock'}
    assert all(path.read_bytes() == content for path, content in before.items())
    for path in run.glob('*.pth'):  # logs alone are in nobody's way
        path.unlink()
    train(config, run)


@pytest.mark.parametrize('line', ['', "runner_type = 'Runner'\n"])
def test_a_test_leaves_the_config_of_its_run(line, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / 'run')
    config, weights = run / 'tiny.py', tmp_path / 'weights.pth'
    before = f'{config.read_text()}resume = True\n{line}'  # as one may have been left by a run
    config.write_text(before)
    torch.save({'state_dict': read_state(str(trained / 'epoch_2.pth'))}, weights)
    score(config, weights, run, 'test_dataloader.batch_size=50')
    assert config.read_text() == before
    of_test = max(run.glob('*/vis_data/config.py'), key=lambda path: path.stat().st_mtime)
    assert 'batch_size=50' in of_test.read_text()


OTHER_SETTINGS = """
    model.drop_path_rate=0.2 train_dataloader.batch_size=50 optim_wrapper.optimizer.lr=0.05
    optim_wrapper.optimizer.weight_decay=0.5 param_scheduler.1.T_max=7
"""


def test_a_resumed_run_says_what_it_has_of_its_checkpoint(trained, config, tmp_path):
    work = shutil.copytree(trained, tmp_path / 'run')
    for epochs in (3, 4):
        train(config, work, *OTHER_SETTINGS.split(), f'train_cfg.max_epochs={epochs}', resume=True)
    logs = [log.read_text() for log in sorted(work.glob('*/*.log'))]
    lines = [line for log in logs for line in log.splitlines() if '--resume: ' in line]
    assert len(lines) == 2
    scheduled = 'param_scheduler.1.T_max is 38 in the checkpoint and 7 in the config, the checkp'
    for line in lines:
        for name, former, value in (('lr', 0.002, 0.05), ('weight_decay', 0.05, 0.5)):
            differing = f'{name} is {former} in the checkpoint and {value} in the config, the check'
            assert f'optim_wrapper.optimizer.{differing}' in line
        assert scheduled in line and 'max_epochs' not in line and 'drop_path' not in line
    # of which the second has what the first went on with
    batch = 'total_batch_size is 100 in the checkpoint and 50 in the config, the config counts'
    assert batch in lines[0] and 'total_batch_size' not in lines[1]
    saved = read_content(str(work / 'epoch_4.pth'))
    for group in saved['optimizer']['param_groups']:
        assert group['initial_lr'] == 0.002 and group['weight_decay'] in (0.0, 0.05)
    assert saved['param_schedulers'][1]['T_max'] == 38 * 3  # iterations of 100 of 309 images


@cases(
    'option, field',
    ('model.moe.code_share=0.3', 'code_share'),
    ('optim_wrapper.optimizer.type=Adam', r'optim_wrapper\.optimizer\.type'),
    ('param_scheduler.1.type=CosineAnnealingMomentum', r'param_scheduler\.1\.type'),
    ('train_dataloader.dataset.imbalance=50', r'len\(train_dataloader\.dataset\)=\d+ .* 309,'),
)
def test_a_run_goes_on_with_the_model_states_and_data_of_its_checkpoint(
    option, field, trained, config, tmp_path
):
    work = shutil.copytree(trained, tmp_path / 'run')
    with pytest.raises(SystemExit, match=field):
        train(config, work, option, 'train_cfg.max_epochs=3', resume=True)


@cases(
    'saved, option, what',
    ({'ema_state_dict': {}}, 'log_level=INFO', 'EMAHook=False is not possible: True, as wh'),
    ({}, 'default_hooks.ema.type=EMAHook', 'EMAHook=True is not possible: False, as when'),
)
def test_a_run_goes_on_with_averages_if_it_has_them(saved, option, what, trained, config, tmp_path):
    file = shutil.copytree(trained, tmp_path / 'run') / 'epoch_2.pth'
    torch.save({**torch.load(file, weights_only=True), **saved}, file)
    with pytest.raises(SystemExit, match=what):
        train(config, file.parent, option, resume=True)


@cases(
    'change, message',
    (lambda weight: weight.fill_(torch.nan), 'is damaged: model.head.weight has values nan or inf'),
    (lambda weight: weight.fill_(torch.inf), 'is damaged: model.head.weight has values nan or inf'),
    (lambda weight: weight.add(1).to(torch.int8), 'model.head.weight is torch.int8, not real'),
)
def test_weights_that_are_no_real_numbers_are_refused(change, message, trained, config, tmp_path):
    work, image = tmp_path / 'run', tmp_path / 'a.png'
    work.mkdir()
    file = work / 'epoch_2.pth'
    content = torch.load(trained / file.name, weights_only=True)
    content['state_dict']['model.head.weight'] = change(content['state_dict']['model.head.weight'])
    torch.save(content, file)
    write_image(image)
    for tool in (
        lambda: score(config, file, tmp_path),
        lambda: train(config, work, 'train_cfg.max_epochs=3', resume=True),
        lambda: cli.predict([config, str(file), str(image), '--out-dir', str(tmp_path / 'out')]),
        lambda: export([config, str(file), str(tmp_path / 'a.pt2')]),
        lambda: publish([str(file), str(tmp_path / 'a.pth')]),
    ):
        refused(rf"epoch_2\.pth' .*{message}", tool, error=SystemExit)


def test_a_training_writes_through_no_link(config, tmp_path, monkeypatch):
    work, outside = tmp_path / 'run', tmp_path / 'outside'
    work.mkdir()
    outside.mkdir()
    names = {'tiny.py', '.before_restarts', '.writable', '.lock'}
    for name in names:
        (outside / name).write_text(name)
        os.utime(outside / name, (1, 1))
        (work / name).symlink_to(outside / name)
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')  # as torchrun sets
    with pytest.raises(SystemExit, match=r'--work-dir=.*\.lock'):
        train(config, work)
    (work / '.lock').unlink()
    train(config, work, 'train_cfg.max_epochs=1')
    assert 'num_experts=2' in (work / 'tiny.py').read_text()
    assert {path.name for path in outside.iterdir()} == names
    assert all(path.read_text() == path.name for path in outside.iterdir())
    assert all(path.stat().st_mtime == 1 for path in outside.iterdir())


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


TRAIN, TEST = 'CONFIG --amp --work-dir w --cfg-options', 'CONFIG CONFIG --work-dir w --out'
LATER = TRAIN.replace(' w ', ' later ')  # told by what has made a work dir


@cases(
    'command, message',
    (f'{TRAIN} model.moe.top_k=3 model.model_name=vit_tiny_smoe', r'model\.moe\.top_k=3 is not'),
    # a typo, and what was meant
    (f'{TRAIN} model.model_name=vit_tiny_smoe model.moe.topp_k=1', r'topp_k=1 .*\btop_k\b'),
    (f'{TRAIN} model.model_name=vit_tiny_vqmo', r'model_name=.*\bvit_tiny_vqmoe\b'),
    (f'{TRAIN} model.img_sizee=3', 'img_sizee'),
    (f'{TRAIN} trian_cfg.max_epochs=1', r'trian_cfg\.max_epochs=1 is not'),
    (f'{TRAIN} train_cfg.max_epochs=ten', r"train_cfg\.max_epochs='ten' is not"),
    (f'{TRAIN} model.in_chans=1', r'model\.in_chans=1 is not'),
    (f'{TRAIN} default_hooks.loger=None', r'default_hooks\.loger=None is not'),
    (f'{TRAIN} model.moe=all', r'moe='),
    (f'{TRAIN} model.moe=None model.moe.top_k=2', r'--cfg-options model\.moe model\.moe\.top_k: '),
    (f'{LATER} model.num_classes=7', r'model\.num_classes=7'),
    (f"{LATER} activation_checkpointing=['model.blocks.1.mlp.router']", 'activation_check'),
    (f'{LATER} runner_type=Foo', "runner_type='Foo' is not"),
    (f'{TRAIN} optim_wrapper.type=ApexOptimWrapper', r"optim_wrapper\.type='ApexOptimWrapper' is"),
    (f'{TRAIN} auto_scale_lr.enabled=True', r'auto_scale_lr\.enabled=True is not'),
    (f'{TRAIN} compile.mode=max-autotune', r"compile\.mode='max-autotune' is not"),
    (f"{LATER} custom_hooks=[{{'type':'EMAHook'}}]", r"custom_hooks=\['EMAHook'\] is not"),
    (f'{CONFIGS}/comparisons/cifar10_budget.py', 'model=None is not possible'),
    ('CONFIG --launcher pytorch', "--launcher='pytorch' .* RANK is not set"),
    ('CONFIG none.pth', "checkpoint 'none.pth' does not exist"),
    (f'{TEST} .', r"--out='\.' is not possible: a file"),
    (f'{TEST} tiny.py/m.json', r'folder tiny\.py cannot be written'),
)
def test_a_mistake_is_one_line_and_leaves_nothing(config, command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = command.replace('CONFIG', config).split()
    tool = cli.train if len(arguments) == 1 or arguments[1].startswith('-') else cli.test
    refused(f'^error: .*{message}', tool, arguments, error=SystemExit)
    assert {path.name for path in tmp_path.iterdir()} <= {'tiny.py', 'later'}


def test_the_trace_of_a_mistake_is_there_for_who_asks(config):
    with pytest.raises(ValueError, match=r'^moe\.foo=1'):
        cli.train([config, '--debug', '--cfg-options', 'model.moe.foo=1'])


def find_card(monkeypatch: pytest.MonkeyPatch, supported: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: supported)


@pytest.mark.parametrize('supported, dtype', [(True, 'bfloat16'), (False, 'float16')])
def test_amp_on_a_gpu_is_bfloat16_where_the_gpu_has_it(config, monkeypatch, supported, dtype):
    find_card(monkeypatch, supported)
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
    find_card(monkeypatch)
    line = suit_card(settings, 'c.py')
    assert settings.optim_wrapper.optimizer.get('fused') == fused
    assert ('bfloat16: vqmoe train c.py --amp' in line) == told
    settings = load_config(config, {'parallel': {'param_dtype': 'bfloat16'}})
    assert not suit_card(settings, 'c.py') and 'fused' not in settings.optim_wrapper.optimizer


def test_amp_on_a_cpu_takes_a_config_for_a_gpu(config, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(optim, 'print_log', lambda line, logger: lines.append(line))
    for_gpus = {'type': 'AmpOptimWrapper', 'loss_scale': 'dynamic', 'dtype': 'float16'}
    given = {f'optim_wrapper.{name}': value for name, value in for_gpus.items()}
    use_amp(plain := load_config(config))
    use_amp(settings := load_config(config, given))
    assert settings.optim_wrapper == plain.optim_wrapper
    assert len(lines) == 2 and all('is for CUDA' in line for line in lines)
    build_optim_wrapper(torch.nn.Linear(1, 1), settings.optim_wrapper)


CODES = 'model.blocks.1.mlp.quantizer.codebook.'


@pytest.mark.parametrize('book', ['ema', 'cvq'])
def test_codes_that_statistics_move_are_copied_and_codes_that_are_weights_averaged(
    book, config, tmp_path
):
    options = ['default_hooks.ema.type=EMAHook', 'default_hooks.ema.momentum=0.001']
    train(config, tmp_path / 'run', *options, f'model.moe.codebook={book}')
    content = read_content(str(tmp_path / 'run/epoch_2.pth'))
    one, other = (
        {n.removeprefix(f'{prefix}{CODES}'): v for n, v in content[of].items() if CODES in n}
        for of, prefix in (('state_dict', ''), ('ema_state_dict', 'module.'))
    )
    if book == 'ema':
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert one['updates'] == content['meta']['iter']
    else:  # the random codes before k-means are no longer than a tenth of a token
        trained = other['embed']
        assert 0 < (one['embed'] - trained).norm() < 0.3 * trained.norm()


def tool(_rank: int, length: int, errors: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    run(argparse.ArgumentParser(), [], lambda _: print('-' * length))


@pytest.mark.parametrize('length', [1, 100_000], ids=['as_it_ends', 'as_it_prints'])
def test_a_tool_whose_output_is_read_no_more_ends_as_others_do(length, tmp_path):
    with pytest.raises(ProcessExitedException) as ended:
        spawn(tool, (length, tmp_path / 'errors'), 1)
    assert ended.value.exit_code == -signal.SIGPIPE
    assert (tmp_path / 'errors').read_text() == ''


@pytest.mark.filterwarnings('ignore:Detected call of .scheduler:UserWarning')
@pytest.mark.parametrize('choice', ['bar', 'plain', None])
def test_a_terminal_shows_a_bar_and_a_file_every_line(choice, config, tmp_path, capsys):
    twice, once = 'optim_wrapper.accumulative_counts=2', 'train_cfg.max_epochs=1'
    asked = [] if choice is None else ['--log', choice]  # what is no terminal is plain
    run = tmp_path / 'run'
    named = ['--cfg-options', f'experiment_name=terminal_{choice}']
    cli.train([config, '--work-dir', str(run), *asked, *named, twice, once])
    shown = capsys.readouterr().out
    assert ' 200 images: 1 processes x 100 images x 2 batches' in shown
    assert 'Training vit_tiny_vqmoe (' in shown and 'on digits (309 images): 1 epochs' in shown
    assert f'last {run}/epoch_1.pth' in shown and 'Trained, accuracy/top1 ' in shown
    bar = choice == 'bar'
    assert ('| 3/3 [' in shown and ', loss ' in shown) == bar
    assert 'Config:' not in shown  # which the file has
    assert ('Epoch(val) [1][1/1]' in shown) != bar
    (log,) = run.glob('*/*.log')
    assert 'Config:' in log.read_text()
    assert any('Epoch(val)' in line for line in reports(run))
    score(config, run / 'epoch_1.pth', run, arguments=asked)
    assert 'Tested  accuracy/top1 ' in capsys.readouterr().out
