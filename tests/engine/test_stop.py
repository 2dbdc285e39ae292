"""SIGTERM and Ctrl-C in the middle of a training, in processes of their own."""

import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.checkpoint_files import last_checkpoint
from vqmoe_vision.engine.checkpoint_hook import keep_workers

from .. import cases
from ..forked import ROOT, run_tool, spawn
from ..soak.kinds import same
from . import tiny

# four iterations an epoch; sends itself a signal in the second iteration of the second epoch, in
# its last one, or in the first validation, which uses averaged weights, after an epoch that ends
# without a checkpoint
TINY = f"""{tiny.TINY}
custom_imports = dict(imports=['vqmoe_vision.classification', 'told_to_stop'])
train_dataloader = dict(batch_size=75, dataset=dict(imbalance=100), WORKERS)  # 309 images
val_dataloader = dict(batch_size=120)
train_cfg = dict(max_epochs=3, val_interval=1)
default_hooks = dict(
    checkpoint=dict(interval=2), stop=dict(type='ToldToStop', at=AT, signals=SIGNALS),
    ema=dict(type='EMAHook', momentum=0.1),
)
"""
# a signal before any other hook has seen the iteration; gradients of three batches are added up
EARLY = TINY.replace("type='ToldToStop'", "type='ToldEarly'")
ADDED = TINY + 'optim_wrapper = dict(accumulative_counts=3)\n'
BY_ITERATION = TINY.replace('interval=2)', 'interval=2, by_epoch=False)')
HOOK = """
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class ToldToStop(Hook):
    priority = 'LOWEST'  # in the iteration, after all other hooks

    def __init__(self, at, signals):
        self.at, self.signals = at, signals

    def send(self, at, *now):
        if [at, *now] == self.at and os.path.exists('armed'):
            if at != 'iteration':
                os.remove('armed')
            for number in self.signals:
                os.kill(os.getpid(), number)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.send('iteration', runner.iter)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.send('validation', runner.epoch, batch_idx)

@HOOKS.register_module()
class ToldEarly(ToldToStop):
    priority = 'HIGHEST'  # before all other hooks

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.send('after', runner.iter)
"""


def start(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess:
    return run_tool('train.py', 'tiny.py', '--work-dir', 'w', *arguments, folder=folder, **options)


def write(folder: Path, at: list, signals: list[int], workers='', config=TINY) -> None:
    folder.mkdir(exist_ok=True)
    text = config.replace('AT', repr(at)).replace('SIGNALS', repr([*map(int, signals)]))
    (folder / 'tiny.py').write_text(text.replace('WORKERS', workers))
    (folder / 'told_to_stop.py').write_text(HOOK)
    (folder / 'armed').touch()


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory) -> Callable[[str], dict]:
    @functools.cache
    def train(config: str) -> dict:
        folder = tmp_path_factory.mktemp('whole')
        write(folder, ['never'], [], config=config)
        done = start(folder)
        assert done.returncode == 0, done.stderr
        return read_content(str(last_checkpoint(folder / 'w')))

    return train


LONG = pytest.mark.long


@cases(
    'number, at, saved, workers, config',
    (signal.SIGTERM, ['iteration', 5], 'iter_6.pth', '', TINY),
    pytest.param(signal.SIGINT, ['iteration', 7], 'iter_8.pth', 'num_workers=1', TINY, marks=LONG),
    pytest.param(signal.SIGINT, ['validation', 1, 0], 'epoch_1.pth', '', TINY, marks=LONG),
    pytest.param(signal.SIGINT, ['iteration', 4], 'iter_5.pth', '', BY_ITERATION, marks=LONG),
    pytest.param(signal.SIGTERM, ['after', 5], 'iter_6.pth', '', EARLY, marks=LONG),
    # in the last iteration of an epoch, and in the middle
    (signal.SIGTERM, ['iteration', 3], 'iter_4.pth', '', ADDED),
    pytest.param(signal.SIGTERM, ['iteration', 4], 'iter_5.pth', '', ADDED, marks=LONG),
)
def test_a_run_that_is_stopped_goes_on_bit_for_bit(
    number, at, saved, workers, config, uninterrupted, tmp_path
):
    write(tmp_path, at, [number], workers, config)
    stop_and_go_on(tmp_path, number, saved)
    content, whole = read_content(str(last_checkpoint(tmp_path / 'w'))), uninterrupted(config)
    for name in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers'):
        assert same(content[name], whole[name]), name
    info, expected = (each['message_hub']['runtime_info'] for each in (content, whole))
    assert info['best_score'] == expected['best_score']
    last = 'iter_12.pth' if config == BY_ITERATION else 'epoch_3.pth'
    assert {path.name for path in (tmp_path / 'w').glob('[ei]*.pth')} == {last}


def stop_and_go_on(tmp_path: Path, number: int, saved: str) -> None:
    """Starts a training that a signal stops, and goes on by the command that it prints."""
    done = start(tmp_path)
    assert done.returncode == -number  # 143 and 130 in a shell
    last = done.stderr.strip().splitlines()[-1]
    found = re.fullmatch(r'(\w+): saved iteration (\d+); go on with: (.*)', last)
    assert found is not None, done.stderr
    assert found[1] == signal.Signals(number).name
    assert (tmp_path / 'w/last_checkpoint').read_text() == saved
    assert read_content(str(tmp_path / 'w' / saved))['meta']['iter'] == int(found[2])
    (tmp_path / 'armed').unlink(missing_ok=True)
    python, tool, *arguments = shlex.split(found[3])
    assert [python, tool] == [sys.executable, str(ROOT / 'tools/train.py')]
    again = run_tool('train.py', *arguments, folder=tmp_path)
    assert again.returncode == 0, again.stderr


def test_ctrl_c_before_a_training_is_one_line(tmp_path):
    write(tmp_path, ['never'], [])
    # as a config is read
    (tmp_path / 'told_to_stop.py').write_text('import os\nos.kill(os.getpid(), 2)')
    # from the start of the program on
    command = [sys.executable, str(ROOT / 'tools/train.py'), 'tiny.py', '--work-dir', 'w']
    environment = {**os.environ, 'PYTHONPATH': f'.:{ROOT}'}
    # a shell that runs the tests in the background has it ignored
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    given = dict(cwd=tmp_path, env=environment, preexec_fn=heard)
    done = subprocess.run(command, capture_output=True, text=True, **given)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, 'SIGINT: stopped\n')


def test_a_second_signal_ends_a_run_at_once(tmp_path):
    write(tmp_path, ['iteration', 9], [signal.SIGTERM, signal.SIGTERM])
    done = start(tmp_path)
    assert done.returncode == -signal.SIGTERM
    assert (tmp_path / 'w/last_checkpoint').read_text() == 'epoch_2.pth'


def work(_rank: int, file: Path) -> None:
    loader = DataLoader([*range(9)], num_workers=1)
    keep_workers(loader)
    keep_workers(loader)
    batches: Any = iter(loader)
    batches.itself = batches  # what refers to itself is not deleted when the process ends
    next(batches)
    file.write_text(' '.join(str(child.pid) for child in active_children()))


def test_a_process_ends_whose_loader_is_still_at_work(tmp_path):
    spawn(work, (tmp_path / 'workers',), nprocs=1)
    worker = int((tmp_path / 'workers').read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


class SlowSamples(Dataset):
    """Each of which takes a moment, and says whether its worker began as it should."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[int, str]:
        time.sleep(0.1)
        return index, os.environ.get('BEGUN', '')


def begin(worker_id: int) -> None:
    os.environ['BEGUN'] = 'yes'


def test_a_signal_to_all_processes_leaves_the_workers_of_a_loader_at_work():
    loader = DataLoader(SlowSamples(), batch_size=None, num_workers=1, worker_init_fn=begin)
    keep_workers(loader)
    before = set(active_children())
    batches = iter(loader)
    found = [next(batches)]
    (worker,) = set(active_children()) - before
    for number in (signal.SIGTERM, signal.SIGINT):  # as torchrun, or a terminal
        os.kill(worker.pid, number)
    found += batches
    assert found == [[i, 'yes'] for i in range(6)]
