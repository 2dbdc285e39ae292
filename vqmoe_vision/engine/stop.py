"""What becomes of SIGTERM and Ctrl-C while a training runs."""

import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from mmengine.dist import get_rank, get_world_size
from mmengine.runner import Runner
from torch.utils.data import DataLoader

_ending: Finalize | None = None


class StopSignals:
    """Lets a training save before a signal ends it; a second signal ends it at once."""

    def __init__(self, save: Callable[[], int], timeout: float, all_save: bool) -> None:
        self._save, self._all_save = save, all_save
        self._received: int | None = None
        self._process = os.getpid()
        self._former: dict[int, Any] = {}
        self.at_once = False
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

    def obey(self) -> None:
        """Saves and ends the process if a signal has come to any of the run."""
        number = self._received or 0
        if self._group is not None:
            greatest = torch.tensor(number)
            dist.all_reduce(greatest, dist.ReduceOp.MAX, self._group)
            number = int(greatest)
        if not number:
            return
        if self._all_save or get_rank() == 0:
            self._save_and_say(number)
        if self._group is not None:  # torchrun ends all processes as soon as one has ended
            dist.barrier(self._group)
        end_by(number)

    def _save_and_say(self, number: int) -> None:
        saved = self._save()
        if get_rank() == 0:
            name = signal.Signals(number).name
            print(f'{name}: saved iteration {saved}; go on with: {_resume()}', file=sys.stderr)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker of a data loader has this handler too
            if number == signal.SIGTERM:
                end_by(number)
            return
        if self._received is not None:
            end_by(number)
        if not _trains(frame):  # it has failed, and somebody caught that
            self.release()
            signal.raise_signal(number)
            return
        self._received = number
        # Workers may have got the same signal. PyTorch raises an error in the middle of an
        # iteration when it is told that one has ended.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self.at_once and get_rank() == 0 and not self._all_save:
            self._save_and_say(number)
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


def _trains(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is Runner.train.__code__:
            return True
        frame = frame.f_back
    return False


def _resume() -> str:
    if get_world_size() > 1:  # this process does not know how it was launched
        return 'the same command, --resume'
    again = [] if '--resume' in sys.orig_argv else ['--resume']
    return shlex.join([*sys.orig_argv, *again])


def end_by(number: int) -> NoReturn:
    """Ends the process as a signal would have, which loops of a shell look at."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where a shell has closed it
        stream.flush()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    raise AssertionError('a default signal ends the process')
