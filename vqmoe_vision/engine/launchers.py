"""What started a process of many, and which of them it is."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterable

from mmengine.config import Config

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


def check_alone() -> None:
    """Refuses processes that do not know of each other, which would write the same files."""
    size = os.environ.get('WORLD_SIZE', '1')
    if 'TORCHELASTIC_RUN_ID' not in os.environ or size == '1':
        return
    if os.environ['RANK'] != '0':
        time.sleep(3)  # torchrun ends all as soon as one has ended
        raise SystemExit(1)
    raise ValueError(
        f'torchrun has started {size} processes: --launcher pytorch makes them one run'
    )


def place(launcher: str) -> tuple[int, int, int]:
    """Reads the environment of a launcher, and puts MASTER_ADDR and MASTER_PORT into it."""
    names, command = _LAUNCHERS[launcher]
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ValueError(
            f'--launcher {launcher} is for processes that {command!r} has started: {missing[0]} is '
            'not set'
        )
    if 'MASTER_ADDR' not in os.environ:
        os.environ['MASTER_ADDR'] = _first_host(launcher)
    os.environ.setdefault('MASTER_PORT', '29500')
    rank, size, local_rank = (_number(name) for name in names)
    if not 0 <= rank < size:
        raise ValueError(f'{names[0]}={rank} must be below {names[1]}={size}, counted from 0')
    return rank, size, local_rank


def multiplied_batch(config: Config, size: int, options: Iterable[str]) -> str:
    """Why a config trains otherwise on several processes than on one; empty if it does not."""
    name = 'train_dataloader.batch_size'
    batch = (config.get('train_dataloader') or {}).get('batch_size')
    if size == 1 or batch is None or {name, 'train_dataloader'} & {*options}:
        return ''
    held = f'{name}={batch // size} holds {batch}, and ' if batch % size == 0 else ''
    return (
        f'{name}={batch} counts one process, and {size} would train on {size * batch} images a '
        f'step: write --cfg-options {name}=B; {held}{name}={batch} takes {size * batch}'
    )


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise ValueError(f'{name}={text} must be a whole number')
    return int(text)


def _first_host(launcher: str) -> str:
    """The machine of the first process; Slurm writes several as node[1-4,7]."""
    hosts = os.environ.get('SLURM_STEP_NODELIST') or os.environ.get('SLURM_NODELIST', '')
    if launcher == 'slurm' and shutil.which('scontrol'):
        command = ['scontrol', 'show', 'hostnames', hosts]
        return subprocess.check_output(command, text=True).split()[0]
    if launcher != 'slurm' or not hosts or set(hosts) & set('[,'):
        raise ValueError(
            f'--launcher {launcher} needs the variable MASTER_ADDR, the address of the first '
            'machine'
        )
    return hosts
