"""Many processes as one run: their group, what they must have in common, and how they end.

torchrun, srun or mpirun starts them, and ends all as soon as one has failed.
"""

import inspect
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.dist import all_gather_object, init_dist
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.nn.parallel import DistributedDataParallel

from vqmoe_vision.moe.config import check

from .config import flat

# What each launcher calls the rank, the number of processes and the rank on the machine.
_VARIABLES = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}
_TORCHRUN = 'TORCHELASTIC_RUN_ID'
# Seconds for which a rank lets the first one speak, which mostly has the same to say.
_PATIENCE = 3.0


class LostError(Exception):
    """Another process of the run did not answer."""


class RankError(Exception):
    """What a rank of several raised: the rank, and the error."""


@contextmanager
def together(launcher: str) -> Iterator[None]:
    """Whatever fails inside of it ends this process of several with one line."""
    rank = _rank(launcher)
    if launcher == 'none':
        yield
        return
    if rank:
        warnings.simplefilter('ignore')
    if _TORCHRUN in os.environ:  # the others end the processes that they have started themselves
        Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        with ExitStack() as silent:
            if rank:
                silent.enter_context(redirect_stdout(silent.enter_context(open(os.devnull, 'w'))))
            yield
        dist.barrier()  # who ends first takes nobody's connection away
        dist.destroy_process_group()
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, Exception):
            error = plain_error(error)
            get_error_handler().record_exception(error)  # what torchrun shows in the end
        if rank and isinstance(error, KeyboardInterrupt | LostError):
            raise SystemExit(1) from error
        if isinstance(error, KeyboardInterrupt):
            raise
        time.sleep(_PATIENCE if rank else 0)
        raise RankError(rank, error) from error


def _rank(launcher: str) -> int:
    """Reads the variables of a launcher, and sets those that torch reads."""
    if launcher == 'none':
        size = os.environ.get('WORLD_SIZE', '1') if _TORCHRUN in os.environ else '1'
        allowed = f"'pytorch' makes the {size} processes that torchrun has started one run"
        check(size == '1', '--launcher', launcher, allowed)
        return 0
    for name, own in zip(_VARIABLES['pytorch'], _VARIABLES[launcher], strict=True):
        allowed = f'{own} is not set, see docs/how-to/many-processes.md'
        check(own in os.environ, '--launcher', launcher, allowed)
        os.environ[name] = os.environ[own]
    return int(os.environ['RANK'])


def _end_with(parent: int) -> None:
    """Ends this process once the one that started it is gone, whatever it is waiting for."""
    while os.getppid() == parent:
        time.sleep(1)
    sys.stderr.flush()
    os._exit(1)


def plain_error(error: Exception) -> Exception:
    """An error of a collective operation in terms of a run; any other one as it is."""
    said = str(error) if isinstance(error, RuntimeError) else ''
    if 'Expected to have finished reduction' in said:
        return ValueError(
            'find_unused_parameters=False: some parameters got no gradient, and the processes wait '
            'for all of them unless it is True'
        )
    # what gloo says where another process is gone, and where it has not answered in time
    if re.search('Connection (reset|closed) by peer|Connection refused|Broken pipe', said):
        return LostError('another process has ended: its own line says why, unless it was killed')
    if re.search(r'Timed out waiting \d+ ?ms', said):
        return LostError('another process has not answered within env_cfg.dist_cfg.timeout')
    return error


def timeout_of(config: Config) -> float:
    """Seconds after which a process no longer waits for another."""
    return config.get('env_cfg', {}).get('dist_cfg', {}).get('timeout', 1800)


def join(launcher: str, config: Config) -> None:
    """Makes the process group that mmengine works with."""
    if launcher == 'none':
        return
    environment = config.get('env_cfg', {})
    options = dict(environment.get('dist_cfg', {}))
    attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    if attempt != '0' and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        # torch's own options lead to the addresses of processes of the attempt before
        store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']))
        options['store'] = dist.PrefixStore(f'attempt {attempt}', store)
        options |= {'rank': int(os.environ['RANK']), 'world_size': int(os.environ['WORLD_SIZE'])}
    if torch.cuda.is_available():
        set_multi_processing(**environment.get('mp_cfg', {}), distributed=True)
        init_dist(launcher, **options)
        return
    # mmengine's takes every process for one with a GPU
    backend = options.pop('backend', 'gloo')
    if backend == 'nccl':  # every config of OpenMMLab says so
        print_log("env_cfg.dist_cfg.backend='nccl' needs GPUs: gloo on a CPU", 'current')
    options['timeout'] = timedelta(seconds=timeout_of(config))
    dist.init_process_group('gloo' if backend == 'nccl' else backend, **options)


def check_configs(config: Config) -> None:
    """Compares the configs of all processes."""
    # in each process a set is in another order, and a function at another address
    found = {
        name: sorted(map(repr, value)) if isinstance(value, set | frozenset) else value
        for name, value in flat(config.to_dict()).items()
    }
    _check_alike('configs', {n: re.sub(' at 0x[0-9a-f]+', '', repr(v)) for n, v in found.items()})


def check_datasets(runner: Runner, splits: tuple[str, ...]) -> None:
    """Compares the data sets of all processes."""
    fields = {}
    for name in (f'{split}_dataloader' for split in splits):
        if runner.cfg.get(name) is not None:
            dataset = getattr(runner, name).dataset
            classes = getattr(dataset, 'metainfo', {}).get('classes', ())
            fields[f'len({name}.dataset)'] = str(len(dataset))
            fields[f'{name}.dataset.metainfo.classes'] = ', '.join(map(str, classes))
    _check_alike('data sets', fields)


def _check_alike(what: str, fields: Mapping[str, str]) -> None:
    first, *others = all_gather_object(dict(fields))
    for rank, other in enumerate(others, start=1):
        for name in {**first, **other}:
            one, two = first.get(name, 'missing'), other.get(name, 'missing')
            if one != two:
                told = f'{name} is {one} on rank 0 and {two} on rank {rank}'
                raise ValueError(f'the ranks have different {what}: {told}')


@MODEL_WRAPPERS.register_module()
class OwnDataParallel(MMDistributedDataParallel):
    """mmengine's, for a CPU too, that sends no buffers around and has each gradient once.

    Codebooks and counts are the same on all ranks already, as their layers add them up.

    Args:
        module: The model.
        **options: As mmengine's.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        # by torch 2.13
        renamed = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel).parameters
        options.setdefault('forward_sync_buffers' if renamed else 'broadcast_buffers', False)
        if next(module.parameters()).device.type == 'cpu':
            options['device_ids'] = None
        # gradients lie where they are sent from, and not in memory of their own
        options.setdefault('gradient_as_bucket_view', True)
        super().__init__(_with_possible_norms(module), **options)


@MODEL_WRAPPERS.register_module()
class Unwrapped:
    """No wrapper: what distributes the model is in the model."""

    def __new__(cls, module: nn.Module) -> Any:
        """The model itself."""
        return _with_possible_norms(module)


def _with_possible_norms(module: nn.Module) -> nn.Module:
    """A model without batch norms over processes on a CPU, as torch has them for GPUs alone."""
    joint = any(isinstance(part, nn.SyncBatchNorm) for part in module.modules())
    if not joint or next(module.parameters()).device.type != 'cpu':
        return module
    told = 'sync_bn needs GPUs: as sync_bn=None on a CPU, where each process has norms of its own'
    print_log(told, 'current')
    return revert_sync_batchnorm(module)
