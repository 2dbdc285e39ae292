"""Many processes as one run, which meet at a store before they read anything.

Where one fails it says why in one line, and all others end without a word.
"""

import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from .arrival import arrive, claim, is_complete, open_store
from .launchers import check_alone, place
from .process_group import TIMEOUT, claim_gpu, fill_in_wrapper, gpu_name, group_options
from .rank_errors import RankError, plain_error

_PULSE = 1.0  # seconds between two looks at the store
_ENDED, _TOLD, _BEFORE = 'ended', 'told', 'newest checkpoint before'


class Processes:
    """The processes of a run, seen from one of them."""

    def __init__(self, launcher: str) -> None:
        self.rank, self.size, self._local_rank = 0, 1, 0
        self._store: dist.Store | None = None
        self._left = threading.Event()
        self._watch: threading.Thread | None = None
        self._told: int | None = None
        self.timeout = TIMEOUT
        self.save_together = False
        self._hosts_only: dist.ProcessGroup | None = None
        if launcher == 'none':
            check_alone()
            return
        self.rank, self.size, self._local_rank = place(launcher)
        if self.rank:
            warnings.simplefilter('ignore')
        attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
        # torchrun keeps a store for all attempts; elsewhere the first process does
        self._hosts = self.rank == 0 and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True'
        self._of_all_attempts = open_store(self._hosts, self.rank)
        self._store = dist.PrefixStore(f'attempt {attempt}', self._of_all_attempts)
        try:
            claim(self._store, self.rank, self.size)
        except ValueError:
            # they wait for the one that was meant; a run that is complete is another one
            if not is_complete(self._store):
                self.end()
            raise
        # a connection of its own: the main thread may be waiting in the other one
        watched = dist.PrefixStore(f'attempt {attempt}', open_store(False, self.rank))
        self._watch = threading.Thread(target=self._look, args=(watched,), daemon=True)
        self._watch.start()

    def _look(self, store: dist.Store) -> None:
        """Ends this process after another has ended, whatever it is waiting for."""
        while not self._left.wait(_PULSE):
            try:
                if store.check([_TOLD]):
                    self._told = int(store.get(_TOLD))
                ended = store.check([_ENDED])
            except RuntimeError:  # the process or torchrun that kept the store has ended
                ended = True
            # the main thread has time to find out
            if ended and not self._left.wait(2 * _PULSE):
                sys.stdout.flush()
                os._exit(1)

    def join(self, config: Config) -> None:
        """Makes the process group that mmengine works with, and lets it wrap the model for it."""
        if self._store is None:
            return
        device = get_device()
        backend, self.timeout = group_options(config.get('env_cfg', {}).get('dist_cfg', {}), device)
        index = self._local_rank
        if device == 'cuda':
            index %= torch.cuda.device_count()
            claim_gpu(self._store, gpu_name(index), self._local_rank)
            torch.cuda.set_device(index)
        # where mmengine looks for the GPU
        os.environ['LOCAL_RANK'] = str(index)
        fill_in_wrapper(config, device)
        arrive(self._store, self.rank, self.size, self.timeout)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore('group', self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=self.timeout),
        )

    def leave(self) -> None:
        """Ends the process group after a run; the last one waits for nobody."""
        self._left.set()
        if self._watch is not None:
            self._watch.join()
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def ended(self) -> bool:
        """Whether another process has said that the run ends."""
        return self._store is not None and self._store.check([_ENDED])

    def end(self) -> bool:
        """Lets all other processes end."""
        self._left.set()
        if self._store is None:
            return True
        own = str(self.rank)
        try:
            first = self._store.compare_set(_ENDED, '', own).decode() == own
        except RuntimeError:  # whoever kept the store is gone: nobody else can say so
            return True
        # whoever keeps the store waits until the others have looked, and so does who is silent:
        # torchrun ends all processes as soon as one has ended
        if self.size > 1 and (self._hosts or not first):
            time.sleep(3 * _PULSE)
        return first

    def tell(self, number: int) -> None:
        """Passes a signal on to the first process, which saves."""
        assert self._store is not None
        self._store.set(_TOLD, str(number))

    def told(self) -> int | None:
        """Signal that another process passed on."""
        return self._told

    def share_saves(self) -> None:
        """Lets all processes take part in saves, also in that of a run which is told to stop."""
        self.save_together = True
        # what is agreed on must not wait for a GPU
        self._hosts_only = dist.new_group(backend='gloo', timeout=timedelta(seconds=self.timeout))

    def agreed(self, number: int | None) -> int | None:
        """Signal that any of the processes has received; all have to ask."""
        greatest = torch.tensor(number or 0)
        dist.all_reduce(greatest, dist.ReduceOp.MAX, self._hosts_only)
        return int(greatest) or None

    def fail(self, error: Exception) -> NoReturn:
        """Ends all processes because of an error."""
        first = self.end()
        if not first:
            raise SystemExit(1) from error
        if isinstance(error, RuntimeError):
            error = plain_error(error, self.timeout)
        if 'TORCHELASTIC_ERROR_FILE' in os.environ:  # what torchrun shows in the end
            get_error_handler().record_exception(error)
        raise RankError(self.rank, error) from error

    def refuse(self, problem: str) -> NoReturn:
        """Ends all processes because of what each of them has found."""
        if self.rank == 0:
            raise ValueError(problem)
        time.sleep(3 * _PULSE)
        raise SystemExit(1)

    def decide(self, of_first: Any) -> Any:
        """What the first process has decided."""
        values = [of_first]
        if dist.is_initialized():
            dist.broadcast_object_list(values)
        return values[0]

    def newest_before(self, newest: float) -> float:
        """When the newest checkpoint was written before the first attempt of a run, in seconds."""
        if self._store is None or self._hosts:
            return newest
        # torchrun keeps it while it starts the processes again
        return float(self._of_all_attempts.compare_set(_BEFORE, '', repr(newest)))


_current: Processes | None = None


def current() -> Processes | None:
    """The processes that `together` has brought together; None for one that is alone."""
    return _current


@contextmanager
def together(launcher: str) -> Iterator[Processes]:
    """Brings the processes of a run together, and ends all of them if one fails."""
    global _current
    processes = Processes(launcher)
    if launcher == 'none':
        yield processes
        return
    _current = processes
    with open(os.devnull, 'w') as nowhere:
        silent = redirect_stdout(nowhere) if processes.rank else nullcontext()
        try:
            with silent:
                yield processes
                processes.leave()
        except KeyboardInterrupt as error:
            if not processes.end():
                raise SystemExit(1) from error
            raise
        except Exception as error:
            processes.fail(error)
        finally:
            _current = None
