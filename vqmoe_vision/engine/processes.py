"""Many processes as one run: how they find each other, and how all of them end when one does.

mmengine's launcher asks for a GPU, and where one process fails the others wait for it in their next
collective operation. Here the processes meet at a store of torch.distributed before they read
anything. Whoever fails writes there, says why in one line, and all others end without a word.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODEL_WRAPPERS
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.nn.parallel import DistributedDataParallel

# What each launcher calls the rank, the number of processes and the rank on the machine, and how
# to start it.
_LAUNCHERS = {
    'pytorch': (('RANK', 'WORLD_SIZE', 'LOCAL_RANK'), 'torchrun --nproc_per_node=N'),
    'slurm': (('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'), 'srun python'),
    'mpi': (
        ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
        "Open MPI's mpirun python",
    ),
}
LAUNCHERS = ('none', *_LAUNCHERS)
TIMEOUT = 1800.0  # seconds, unless env_cfg.dist_cfg says
_PULSE = 1.0  # seconds between two looks at the store
_ENDED, _TOLD, _BEFORE = 'ended', 'told', 'newest checkpoint before'


class RankError(Exception):
    """What the rank that failed first raised.

    Args:
        rank: Of the process.
        error: What it raised.
    """

    def __init__(self, rank: int, error: BaseException) -> None:
        super().__init__(f'rank {rank}: {error}')
        self.rank, self.error = rank, error


class Processes:
    """The processes of a run, seen from one of them.

    Args:
        launcher: One of `LAUNCHERS`; its variables are in the environment.

    Attributes:
        rank: Of this process.
        size: How many there are.

    Raises:
        ValueError: The environment is not that of the launcher.
    """

    def __init__(self, launcher: str) -> None:
        self.rank, self.size, self._local_rank = 0, 1, 0
        self._store: dist.Store | None = None
        self._left = threading.Event()
        self._watch: threading.Thread | None = None
        self._told: int | None = None
        if launcher == 'none':
            _check_alone()
            return
        self.rank, self.size, self._local_rank = _place(launcher)
        if self.rank:
            warnings.simplefilter('ignore')
        attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
        # torchrun keeps a store for all attempts; elsewhere the first process does
        self._hosts = self.rank == 0 and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True'
        self._of_all_attempts = self._connect(self._hosts)
        self._store = dist.PrefixStore(f'attempt {attempt}', self._of_all_attempts)
        # a connection of its own: the main thread may be waiting in the other one
        watched = dist.PrefixStore(f'attempt {attempt}', self._connect(hosts=False))
        self._watch = threading.Thread(target=self._look, args=(watched,), daemon=True)
        self._watch.start()

    @staticmethod
    def _connect(hosts: bool) -> dist.TCPStore:
        address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
        return dist.TCPStore(address, port, is_master=hosts, wait_for_workers=False)

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
        """Makes the process group that mmengine works with, and lets it wrap the model for it.

        Args:
            config: Its `env_cfg.dist_cfg` names a `backend` and a `timeout` in seconds; its
                `model_wrapper_cfg` is filled in.

        Raises:
            ValueError: The machine has no such device, or an option is none.
        """
        if self._store is None:
            return
        device = get_device()
        backend, timeout = _of_config(config.get('env_cfg', {}).get('dist_cfg', {}), device)
        if device == 'cuda':
            if self._local_rank >= (found := torch.cuda.device_count()):
                raise ValueError(
                    f'LOCAL_RANK={self._local_rank} has no GPU of its own: there are {found} on '
                    'this machine, and as many processes are possible'
                )
            torch.cuda.set_device(self._local_rank)
        # where mmengine looks for it
        os.environ['LOCAL_RANK'] = str(self._local_rank)
        _wrap(config, device)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore('group', self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=timeout),
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
        """Lets all other processes end.

        Returns:
            Whether this is the first one to do so, which says why.
        """
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
        """Passes a signal on to the first process, which saves.

        Args:
            number: Of the signal.
        """
        assert self._store is not None
        self._store.set(_TOLD, str(number))

    def told(self) -> int | None:
        """Signal that another process passed on."""
        return self._told

    def fail(self, error: BaseException) -> NoReturn:
        """Ends all processes because of an error.

        Args:
            error: What this one raised.

        Raises:
            RankError: Of the first process that failed.
            SystemExit: Of all others.
        """
        first = self.end()
        if not first:
            raise SystemExit(1) from error
        if 'TORCHELASTIC_ERROR_FILE' in os.environ:  # what torchrun shows in the end
            get_error_handler().record_exception(error)
        raise RankError(self.rank, error) from error

    def refuse(self, problem: str) -> NoReturn:
        """Ends all processes because of what each of them has found.

        Args:
            problem: What is wrong.

        Raises:
            ValueError: In the first process.
            SystemExit: In all others.
        """
        if self.rank == 0:
            raise ValueError(problem)
        time.sleep(3 * _PULSE)
        raise SystemExit(1)

    def decide(self, of_first: Any) -> Any:
        """What the first process has decided.

        Args:
            of_first: Its value, of which those of others are not used.
        """
        values = [of_first]
        if dist.is_initialized():
            dist.broadcast_object_list(values)
        return values[0]

    def newest_before(self, newest: float) -> float:
        """When the newest checkpoint of a work dir was written before the first attempt of a run.

        Args:
            newest: When the newest one was written before this attempt, in seconds since 1970.
        """
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
    """Brings the processes of a run together, and ends all of them if one fails.

    Args:
        launcher: As `Processes`.

    Yields:
        The processes; they share nothing but a store until they `join`.

    Raises:
        RankError: In the process that failed first.
        ValueError: As `Processes`.
    """
    global _current
    processes = Processes(launcher)
    if launcher == 'none':
        yield processes
        return
    _current = processes
    try:
        yield processes
        processes.leave()
    except (Exception, KeyboardInterrupt) as error:
        processes.fail(error)
    finally:
        _current = None


def _check_alone() -> None:
    """Processes that do not know of each other would write the same files."""
    size = os.environ.get('WORLD_SIZE', '1')
    if 'TORCHELASTIC_RUN_ID' not in os.environ or size == '1':
        return
    if os.environ['RANK'] != '0':
        time.sleep(3 * _PULSE)
        raise SystemExit(1)
    raise ValueError(f'torchrun has started {size} processes: --launcher pytorch makes them one run')


def _place(launcher: str) -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as the launcher says."""
    names, command = _LAUNCHERS[launcher]
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ValueError(
            f'--launcher {launcher} needs {command} in place of python: {missing[0]} is not set'
        )
    if 'MASTER_ADDR' not in os.environ:
        os.environ['MASTER_ADDR'] = _first_host(launcher)
    os.environ.setdefault('MASTER_PORT', '29500')
    rank, size, local_rank = (int(os.environ[name]) for name in names)
    return rank, size, local_rank


def _first_host(launcher: str) -> str:
    """The machine of the first process; Slurm writes several as node[1-4,7]."""
    hosts = os.environ.get('SLURM_STEP_NODELIST') or os.environ.get('SLURM_NODELIST', '')
    if launcher == 'slurm' and shutil.which('scontrol'):
        command = ['scontrol', 'show', 'hostnames', hosts]
        return subprocess.check_output(command, text=True).split()[0]
    if launcher != 'slurm' or not hosts or set(hosts) & set('[,'):
        raise ValueError(
            f'--launcher {launcher} needs the variable MASTER_ADDR, the address of the first machine'
        )
    return hosts


def _of_config(options: dict[str, Any], device: str) -> tuple[str, float]:
    """Backend, and seconds after which a process no longer waits for another."""
    allowed = {'cuda': ('nccl', 'gloo'), 'cpu': ('gloo',)}
    if device not in allowed:
        raise ValueError(f'several processes need device cuda or cpu, and this machine has {device}')
    unknown = sorted(options.keys() - {'backend', 'timeout'})
    if unknown:
        raise ValueError(
            f'env_cfg.dist_cfg.{unknown[0]}={options[unknown[0]]!r} is not supported; it takes '
            'backend and timeout, and the variables MASTER_ADDR and MASTER_PORT say where'
        )
    backend = options.get('backend', allowed[device][0])
    if backend not in allowed[device]:
        raise ValueError(
            f'env_cfg.dist_cfg.backend={backend!r} is not possible on device {device}, which has '
            f'{" and ".join(allowed[device])}; without it the device decides'
        )
    timeout = options.get('timeout', TIMEOUT)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise ValueError(f'env_cfg.dist_cfg.timeout={timeout!r} must be a number of seconds above 0')
    return backend, float(timeout)


def _wrap(config: Config, device: str) -> None:
    """Fills in how mmengine wraps the model, which takes every device for a GPU."""
    wrapper = config.get('model_wrapper_cfg')
    if wrapper is None:
        wrapper = {
            # codebooks and counts are the same on all ranks already, as their layers add them up
            'broadcast_buffers': False,
            'find_unused_parameters': config.get('find_unused_parameters', False),
        }
    wrapper.setdefault('type', 'MMDistributedDataParallel')
    kind = wrapper['type']
    kind = MODEL_WRAPPERS.get(kind) if isinstance(kind, str) else kind
    if device == 'cpu' and isinstance(kind, type) and issubclass(kind, DistributedDataParallel):
        wrapper.setdefault('device_ids', None)
    config.model_wrapper_cfg = wrapper
