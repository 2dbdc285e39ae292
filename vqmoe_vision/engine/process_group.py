"""What a config says of the group of processes, and what it need not say."""

import inspect
import socket
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = 1800.0  # seconds, unless env_cfg.dist_cfg says


def group_options(options: dict[str, Any], device: str) -> tuple[str, float]:
    """Reads `env_cfg.dist_cfg`."""
    allowed = {'cuda': ('nccl', 'gloo'), 'cpu': ('gloo',)}
    if device not in allowed:
        raise ValueError(
            f'several processes need device cuda or cpu, and this machine has {device}'
        )
    unknown = sorted(options.keys() - {'backend', 'timeout'})
    if unknown:
        raise ValueError(
            f'env_cfg.dist_cfg.{unknown[0]}={options[unknown[0]]!r} is not supported; it takes '
            'backend and timeout, and the variables MASTER_ADDR and MASTER_PORT say where'
        )
    backend = options.get('backend', allowed[device][0])
    if (backend, device) == ('nccl', 'cpu'):  # every config of OpenMMLab says so
        print_log("env_cfg.dist_cfg.backend='nccl' needs GPUs: gloo on a CPU", 'current')
        backend = 'gloo'
    if backend not in allowed[device]:
        raise ValueError(
            f'env_cfg.dist_cfg.backend={backend!r} is not possible on device {device}, which has '
            f'{" and ".join(allowed[device])}; without it the device decides'
        )
    timeout = options.get('timeout', TIMEOUT)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise ValueError(
            f'env_cfg.dist_cfg.timeout={timeout!r} must be a number of seconds above 0'
        )
    return backend, float(timeout)


def gpu_name(index: int) -> str:
    """What a GPU is called by all who see it, on NVIDIA's whatever number it has for them."""
    if torch.version.hip is not None:  # some of AMD's cards have no UUID of their own
        return f'GPU {index} of {socket.gethostname()}'
    return f'GPU {torch.cuda.get_device_properties(index).uuid}'


def claim_gpu(store: dist.Store, name: str, local_rank: int) -> None:
    """Refuses two processes on one GPU."""
    if store.add(f'gpu {name}', 1) > 1:
        raise ValueError(
            f'LOCAL_RANK={local_rank} has no GPU of its own: another process of this run has '
            f'{name}, and as many processes are possible as there are GPUs'
        )


@MODEL_WRAPPERS.register_module()
class FilledInDataParallel(MMDistributedDataParallel):
    """mmengine's, by whose other name a next run knows that nobody has asked for a wrapper.

    Args:
        module: The model.
        *args: As mmengine's.
        **kwargs: As mmengine's.
    """

    def __init__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(_with_possible_norms(module), *args, **kwargs)


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


def forget_wrapper(config: Config) -> None:
    """Removes the wrapper that a former run has filled in, unless it was changed since."""
    wrapper = dict(config.get('model_wrapper_cfg') or {})
    kind = wrapper.pop('type', None)
    unused = config.get('find_unused_parameters', False)
    # what says nothing; `find_unused_parameters` of the config wins over what was made of it
    plain = {_sync_option(): (False,), 'find_unused_parameters': (False, unused)}
    same = all(value in plain.get(name, (None,)) for name, value in wrapper.items())
    if kind == Unwrapped.__name__ or (kind == FilledInDataParallel.__name__ and same):
        config.pop('model_wrapper_cfg')


def _sync_option() -> str:
    options = inspect.signature(DistributedDataParallel).parameters
    return 'forward_sync_buffers' if 'forward_sync_buffers' in options else 'broadcast_buffers'


def fill_in_wrapper(config: Config, device: str) -> None:
    """Fills in how mmengine wraps the model, which takes every device for a GPU."""
    wrapper = config.get('model_wrapper_cfg')
    if wrapper is None:
        # codebooks and counts are the same on all ranks already, as their layers add them up
        unused = config.get('find_unused_parameters', False)
        name = FilledInDataParallel.__name__
        wrapper = {'type': name, _sync_option(): False, 'find_unused_parameters': unused}
    wrapper.setdefault('type', 'MMDistributedDataParallel')
    kind = wrapper['type']
    kind = MODEL_WRAPPERS.get(kind) if isinstance(kind, str) else kind
    if device == 'cpu' and isinstance(kind, type) and issubclass(kind, DistributedDataParallel):
        wrapper.setdefault('device_ids', None)
    config.model_wrapper_cfg = wrapper
