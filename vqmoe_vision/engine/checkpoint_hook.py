"""Saves that survive whatever ends a run."""

import inspect
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from math import inf, nextafter
from multiprocessing.util import Finalize
from pathlib import Path
from shlex import join
from traceback import walk_stack
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from vqmoe_vision.moe.config import check

from .checkpoint_files import (
    BEST,
    POINTER,
    RUN,
    candidates,
    delete,
    identify,
    newest_checkpoint,
    newest_time,
    remove_partial,
    write_atomically,
)
from .processes import timeout_of
from .seeding import (
    SEEN,
    SETTINGS,
    VALIDATED,
    check_settings,
    keep_accumulated,
    progress_of,
    read_settings,
    restore_accumulated,
    validation_was_cut_off,
)

_OUTDATED = 'outdated_ckpts'
# of names by which a run finds its checkpoints again
_TEMPLATE = rf'(?!{BEST}|\.)[^/{{}}]*(\{{(:\w+)?\}}[^/{{}}]*)?\.pth'


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """Saves that are whole at every moment, also of a run that is stopped.

    A file is written beside its place and renamed, old ones are deleted after that, and nothing
    outside the work dir is touched. A run that resumes takes the newest file that reads completely,
    and validates first where a validation was cut off.

    Args:
        interval: Epochs, or iterations, between checkpoints.
        **options: As mmengine's, without those of another place for the files.

    Raises:
        ValueError: An option is unknown, or names another place or files that no run would find.
    """

    keep_ckpt_ids: deque[int]

    def __init__(self, interval: int = -1, **options: Any) -> None:
        # mmengine keeps what it does not know for the call that saves, which fails on it
        others = {'out_dir', 'backend_args', 'file_client_args'}
        known = inspect.signature(CheckpointHook).parameters
        for name, value in options.items():
            allowed = 'left out: not known, or checkpoints would not be files in --work-dir'
            valid = name in known and (name not in others or value is None)
            check(valid, f'default_hooks.checkpoint.{name}', value, allowed)
        template = options.get('filename_tmpl') or '{}.pth'
        allowed = f"a name such as 'epoch_{{}}.pth', which begins with no dot and not with {BEST!r}"
        check(bool(re.fullmatch(_TEMPLATE, str(template))), 'filename_tmpl', template, allowed)
        super().__init__(interval, **{**options, 'backend_args': {'backend': 'atomic'}})
        self._outdated: list[str] = []
        self._saved_iter, self._saved_at = -1, 0.0
        self._resumed_from = self._run = ''
        self._settings: dict[str, Any] = {}
        self._validating = self._training = False

    def before_run(self, runner: Runner) -> None:
        """Chooses the checkpoint of a run that resumes, for mmengine follows the pointer alone."""
        folder = Path(runner.work_dir)
        asked = runner._resume and runner._load_from is None
        if asked and (candidates(folder) or (folder / POINTER).is_file()):
            runner._load_from = str(newest_checkpoint(folder, runner.logger.warning))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Goes on with what waited for more batches, and with files wherever they are today."""
        self._resumed_from = Path(str(runner._load_from)).name
        if not runner._resume:
            return
        self._settings = check_settings(runner, checkpoint)
        restore_accumulated(runner, checkpoint)
        _files_in(runner.work_dir, checkpoint)

    def before_train(self, runner: Runner) -> None:
        """Removes what a kill has left, and makes up for a validation that was cut off."""
        hub, folder = runner.message_hub, Path(runner.work_dir)
        self._settings = self._settings or read_settings(runner)
        if is_main_process():
            self._run = identify(folder, runner._resume, hub.get_info(RUN))
            hub.update_info(RUN, self._run)
            remove_partial(folder, self._run)
        super().before_train(runner)
        self._outdated = self.file_backend.outdated  # where mmengine's hook adds to them
        names = hub.get_info(_OUTDATED, [])
        self._outdated += [str(name) for name in names] if isinstance(names, list) else []
        # mmengine writes the last one again after a new best
        self.last_ckpt = hub.get_info('last_ckpt')
        self._saved_at = newest_time(folder)
        spread = runner.cfg.get('parallel') is not None
        self._signals = StopSignals(partial(self._save_now, runner), timeout_of(runner.cfg), spread)
        self._training = True
        for loop in filter(None, (runner.train_loop, runner.val_loop)):
            keep_workers(loop.dataloader)
        if validation_was_cut_off(runner):
            told = 'Validating first: the checkpoint does not say that it was validated'
            runner.logger.info(told)
            runner.val_loop.run()
        done, end, limit = progress_of(runner)
        if done >= end:
            runner.logger.info(f'Nothing is left to train: train_cfg.{limit}={end} is reached')

    def before_train_epoch(self, runner: Runner) -> None:
        """Ends a run that was told to stop between two epochs."""
        self._signals.obey(runner.iter)
        self._signals.waiting_at = runner.iter  # for the first batch

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """A run that is told to stop does so after this iteration."""
        if self._training:  # a validation alone, of `Runner.val`, saves nothing
            self._signals.waiting_at = None

    # until the first batch of a validation other hooks change what is saved
    before_val = before_train_iter

    def after_train_iter(self, runner: Runner, batch_idx: int, *more: Any, **named: Any) -> None:
        """Saves where that is due, and ends a run that was told to stop."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            runner.message_hub.update_info(SEEN, batch_idx + 1)
        super().after_train_iter(runner, batch_idx, *more, **named)
        self._signals.obey(runner.iter + 1)
        # the next batch may take its time; after the last other hooks change what is saved
        last = batch_idx + 1 == len(runner.train_dataloader) or self.is_last_train_iter(runner)
        self._signals.waiting_at = None if last else runner.iter + 1

    def before_val_epoch(self, runner: Runner) -> None:
        """A run that is told to stop does not wait for the validation."""
        if self._training:
            self._validating = True
            self.before_train_epoch(runner)

    def after_val_iter(self, runner: Runner, batch_idx: int, *_: Any, **__: Any) -> None:
        """After the last batch hooks change what is saved."""
        if self._training and batch_idx + 1 == len(runner.val_dataloader):
            self._signals.waiting_at = None

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Saves the best, and ends a run that was told to stop."""
        if not self._training:
            return
        self._validating = False
        runner.message_hub.update_info(VALIDATED, runner.iter)
        super().after_val_epoch(runner, metrics)
        self._signals.obey(runner.iter)

    def after_train(self, runner: Runner) -> None:
        """Gives the signals back, and deletes what a kill after the last save has left."""
        self._signals.release()
        # whatever a checkpoint says, the one that the run went on from may be the last sound one
        self._outdated[:] = [name for name in self._outdated if name != self._resumed_from]
        last = Path(self.out_dir) / Path(str(self.last_ckpt)).name
        if is_main_process() and last.is_file():  # a kill may have come before it was named
            write_atomically(last.with_name(POINTER), last.name.encode())
        self._delete_outdated(runner, last.name)
        super().after_train(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Leaves names without folders in a checkpoint, and when it was written."""
        # later than all others, also where the clock was set back
        self._saved_at = max(time.time(), nextafter(self._saved_at, inf))
        checkpoint['meta'].update({'saved_at': self._saved_at, SETTINGS: self._settings})
        keep_accumulated(runner, checkpoint)
        _files_in('', checkpoint)

    def _save_now(self, runner: Runner, iteration: int) -> None:
        """Saves a run that is told to stop, whatever the interval."""
        for hook in runner.hooks:
            if self._validating and isinstance(hook, EMAHook):  # validation is with the averages
                hook._swap_ema_parameters()
        if self._saved_iter != iteration:
            meta = {'epoch': runner.epoch, 'iter': iteration}
            if self.by_epoch and runner.message_hub.get_info(SEEN, 0):
                name = f'iter_{iteration}.pth'
                self._outdated.append(name)  # once the run that goes on from it has saved
                self._save(runner, name, meta)
            else:
                step = meta['epoch' if self.by_epoch else 'iter']
                self._save_checkpoint_with_step(runner, step, meta)
        runner.visualizer.close()

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                self._outdated.append(self.filename_tmpl.format(self.keep_ckpt_ids[0]))
            self.keep_ckpt_ids.append(step)  # in the place of the oldest
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self._save(runner, self.filename_tmpl.format(step), meta)

    def _save(self, runner: Runner, name: str, meta: dict) -> None:
        folder = Path(self.out_dir)
        self.last_ckpt = str(folder / name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.message_hub.update_info(_OUTDATED, self._outdated)
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
        )
        self._saved_iter = meta['iter']
        if is_main_process():
            write_atomically(folder / POINTER, name.encode())
        self._delete_outdated(runner, name)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, float]) -> None:
        for key in self.key_indicators if self.save_best else ():
            allowed = f'a metric of the validation, which are {", ".join(metrics)}'
            check(key in (*metrics, 'auto'), 'save_best', key, allowed)
        super()._save_best_checkpoint(runner, metrics)
        self._delete_outdated(runner)  # of the best ones: a run goes on from the others

    def _delete_outdated(self, runner: Runner, current: str | None = None) -> None:
        """Deletes outdated files, those that a run could go on from only after a newer one."""
        names = [n for n in self._outdated if current is not None or n.startswith(BEST)]
        info = runner.message_hub.runtime_info
        kept = {current, *(Path(str(info[k])).name for k in info if k.startswith('best_ckpt'))}
        if is_main_process():
            delete(Path(self.out_dir), [name for name in names if name not in kept], self._run)
        self._outdated[:] = [name for name in self._outdated if name not in names]


def _files_in(folder: str, checkpoint: dict) -> None:
    """Puts the checkpoints that mmengine's message hub names into a folder."""
    info = checkpoint['message_hub']['runtime_info']
    for key in info:
        if key.startswith(('best_ckpt', 'last_ckpt')):
            info[key] = str(Path(folder, Path(str(info[key])).name))


_ending: Finalize | None = None


class StopSignals:
    """Lets a training save before a signal ends it; a second signal ends it at once."""

    def __init__(self, save: Callable[[int], None], timeout: float, all_save: bool) -> None:
        self._save, self._all_save = save, all_save
        self._received: int | None = None
        self._process = os.getpid()
        self._former: dict[int, Any] = {}
        # the iteration before which nothing happens but that a data loader is waited for
        self.waiting_at: int | None = None
        # of several processes any may be told; gloo, as what is agreed on must not wait for a GPU
        self._group = None
        if get_world_size() > 1:
            self._group = dist.new_group(backend='gloo', timeout=timedelta(seconds=timeout))
        if threading.current_thread() is not threading.main_thread():
            return  # only there can a handler be set
        for number in (signal.SIGINT, signal.SIGTERM):
            former: Any = signal.getsignal(number)
            owner = getattr(former, '__self__', None)
            if isinstance(owner, StopSignals):  # of a training that failed
                former = owner._former[number]
            if former in (signal.SIG_DFL, signal.default_int_handler):
                self._former[number] = former
                signal.signal(number, self._receive)

    def release(self) -> None:
        """Gives the signals back to whom they belonged before."""
        for number, former in self._former.items():
            signal.signal(number, former)

    def obey(self, iteration: int) -> None:
        """Saves and ends the process if a signal has come to any of the run."""
        number = self._received or 0
        if self._group is not None:
            greatest = torch.tensor(number)
            dist.all_reduce(greatest, dist.ReduceOp.MAX, self._group)
            number = int(greatest)
        if not number:
            return
        if self._all_save or get_rank() == 0:
            self._save_and_say(number, iteration)
        if self._group is not None:  # torchrun ends all processes as soon as one has ended
            dist.barrier(self._group)
        end_by(number)

    def _save_and_say(self, number: int, iteration: int) -> None:
        self._save(iteration)
        if get_rank() == 0:
            again = [] if '--resume' in sys.orig_argv else ['--resume']
            # one of several processes does not know how it was launched
            alone = self._group is None
            how = join([*sys.orig_argv, *again]) if alone else 'the same command, --resume'
            name = signal.Signals(number).name
            print(f'{name}: saved iteration {iteration}; go on with: {how}', file=sys.stderr)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker of a data loader has this handler too
            if number == signal.SIGTERM:
                end_by(number)
            return
        if self._received is not None:
            end_by(number)
        # it has failed, and somebody caught that
        if not any(one.f_code is Runner.train.__code__ for one, _ in walk_stack(frame)):
            self.release()
            signal.raise_signal(number)
            return
        self._received = number
        # Workers may have got the same signal. PyTorch raises an error in the middle of an
        # iteration when it is told that one has ended.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self.waiting_at is not None and get_rank() == 0 and not self._all_save:
            self._save_and_say(number, self.waiting_at)
            end_by(number)


def keep_workers(loader: DataLoader) -> None:
    """Lets the workers of a data loader outlive a signal to all processes of a run."""
    loader.worker_init_fn = partial(_ignore_signals, loader.worker_init_fn)
    global _ending
    if _ending is not None:
        _ending.cancel()
    # with a priority it comes before children are waited for, in a process that is a child too
    _ending = Finalize(None, _end_workers, exitpriority=100)


def _end_workers() -> None:
    """Before multiprocessing ends its children, by a SIGTERM after which it waits for ever."""
    children = [child for child in multiprocessing.active_children() if child.daemon]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # of PyTorch, an error that a worker has ended
    for child in children:
        child.terminate()
    patience = time.monotonic() + 1
    for child in children:
        child.join(max(patience - time.monotonic(), 0))
        if child.is_alive():
            child.kill()


def _ignore_signals(own: Callable[[int], None] | None, worker_id: int) -> None:
    # here and in no earlier place: PyTorch has just set a handler that ends the worker
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if own is not None:
        own(worker_id)


def end_by(number: int) -> NoReturn:
    """Ends the process as a signal would have, which loops of a shell look at."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where a shell has closed it
        stream.flush()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    raise AssertionError('a default signal ends the process')
