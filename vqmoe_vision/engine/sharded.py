"""Runs whose model is spread over processes, as the config's `parallel` says, and their saves.

Their files have whole tensors, or parts beside them: any number of processes goes on from them.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import deepcopy
from functools import partial
from itertools import accumulate, count
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.dist import all_gather_object, broadcast_object_list, get_world_size, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._pytree import tree_map_only, tree_map_with_path

from vqmoe_vision.models.sharding import shard_model
from vqmoe_vision.models.weights import IN_PARTS
from vqmoe_vision.moe.config import check, check_type
from vqmoe_vision.moe.optimizer import mixes_experts

from .checkpoint import PARTS, RUN_FILE, checksum, delete_folder, dotted
from .checkpoint_files import RUN, SaveError, remove_unnamed, sync_folder
from .model import RoutingStatistics
from .optim import KERNELS_FOR_LISTS, scales_loss, with_kernels
from .processes import timeout_of
from .step_values import check_own_parts, check_weights

FIELD = 'parallel'
_OPTIONS = ('expert_processes', 'param_dtype', 'state_dict_type')


def check_parallel(config: Config) -> None:
    """Refuses options of `parallel` that there are not, or that nothing would follow."""
    if (options := config.get(FIELD)) is None:
        return
    known = isinstance(options, dict) and not options.keys() - set(_OPTIONS)
    check(known, FIELD, options, f'its options are {", ".join(_OPTIONS)}')
    check(get_world_size() > 1, FIELD, options, 'it needs several processes, see --launcher')
    wrapper = config.get('model_wrapper_cfg')
    check(wrapper is None, FIELD, options, 'it goes without model_wrapper_cfg')


def check_optim_wrapper(wrapper: Any) -> None:
    """Refuses what looks at gradients or weights as wholes."""
    name = type(wrapper.optimizer).__name__
    allowed = 'one that treats all elements of a tensor alike, such as AdamW, beside parallel'
    check(not mixes_experts(wrapper.optimizer), 'optim_wrapper.optimizer.type', name, allowed)
    for kernel in KERNELS_FOR_LISTS:
        asked = wrapper.optimizer.defaults.get(kernel)
        allowed = 'None beside parallel: its kernels take tensors of one layout'
        check(not asked, f'optim_wrapper.optimizer.{kernel}', asked, allowed)
    by_norm = not wrapper.clip_grad_kwargs or wrapper.grad_name == 'grad_norm'
    check(by_norm, 'optim_wrapper.clip_grad.type', 'value', "'norm' beside parallel")
    allowed = f"{FIELD} goes without: use dtype='bfloat16' and loss_scale=dict(enabled=False)"
    check(not scales_loss(wrapper), 'optim_wrapper.loss_scale', 'a loss scale', allowed)


class ShardingHook(Hook):
    """Spreads the model of a run over all processes while it trains.

    Args:
        expert_processes: As `shard_model`.
        param_dtype: 'bfloat16' or 'float32'; None for that of the parameters.
        state_dict_type: 'full' for checkpoints of whole tensors, or 'sharded' for a folder of parts
            beside each.

    Raises:
        ValueError: `param_dtype` or `state_dict_type` is another one.
    """

    # after all that a training starts with, which sees the whole model
    priority = 'LOWEST'

    def __init__(
        self,
        expert_processes: int = 1,
        param_dtype: str | None = None,
        state_dict_type: str = 'full',
    ) -> None:
        # float16 needs a loss scale
        check_type(f'{FIELD}.param_dtype', Literal['bfloat16', 'float32'] | None, param_dtype)
        # the words of Composer and Lightning
        check_type(f'{FIELD}.state_dict_type', Literal['full', 'sharded'], state_dict_type)
        self.expert_processes = expert_processes
        self.param_dtype = None if param_dtype is None else getattr(torch, param_dtype)
        self.in_parts = state_dict_type == 'sharded'
        self._sharded: Any = None
        # what belongs to all processes, in a save for the place of what the first one has
        self._state: dict[str, Any] = {}

    def before_run(self, runner: Runner) -> None:
        """Refuses what has no meaning for a part of a model."""
        options = runner.cfg[FIELD]
        averages = any(isinstance(hook, EMAHook) for hook in runner.hooks)
        check(not averages, FIELD, options, 'it goes without EMAHook, which averages whole models')
        compiled = runner.cfg.get('compile')
        check(not compiled, 'compile', compiled, f'it goes without {FIELD}')

    def before_train(self, runner: Runner) -> None:
        """Spreads the model, and what the optimizer knows of it after a resume."""
        # torch warns that a norm over groups and experts, added up one after the other, may differ
        # between ranks; here each of them adds up the same numbers in the same order
        logging.getLogger('torch.distributed.tensor._redistribute').setLevel(logging.ERROR)
        wrapper = runner.optim_wrapper
        check_optim_wrapper(wrapper)
        self._sharded = runner.model
        device = next(runner.model.parameters()).device
        self._whole = deepcopy(runner.model.cpu())  # no second model on a GPU
        runner.model.to(device)
        for name, value in vars(runner.model).items():
            if isinstance(value, RoutingStatistics):  # who reads them may ask either of the two
                setattr(self._whole, name, value)
        before = dict(runner.model.named_parameters())
        shard_model(runner.model, self.expert_processes, self.param_dtype, timeout_of(runner.cfg))
        _exchange(wrapper.optimizer, before, dict(runner.model.named_parameters()))
        if wrapper.clip_grad_kwargs:  # inside of what keeps the norm from whoever would read it
            keeper = wrapper.clip_func
            if hasattr(keeper, 'clip'):
                keeper.clip = clip_grad_norm
            else:
                wrapper.clip_func = clip_grad_norm
        # whoever saves: all processes have to take part, and the runner's own asks the first alone
        runner.save_checkpoint = partial(self._save, runner, runner.save_checkpoint)

    def before_val(self, runner: Runner) -> None:
        """Validates on a whole copy."""
        if self._sharded is None:  # a validation that comes before the training
            return
        self._whole.load_state_dict(whole_state(self._sharded.state_dict()))
        runner.model = self._whole.to(next(self._sharded.buffers()).device)

    def after_val(self, runner: Runner) -> None:
        """Goes on with the parts."""
        if self._sharded is not None:
            self._whole.cpu()
            runner.model = self._sharded

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Puts what belongs to all in place of the parts of the first process."""
        checkpoint.update(self._state)

    def _save(
        self,
        runner: Runner,
        save_first: Callable[..., None],
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,  # mmengine's third by position
        save_optimizer: bool = True,
        **options: Any,
    ) -> None:
        """Puts a spread model together for the file of the first process, or writes its parts."""
        state: dict[str, Any] = {'state_dict': self._sharded.state_dict()}
        if save_optimizer:
            wrapper = runner.optim_wrapper
            state['optimizer'] = with_kernels(wrapper.state_dict(), wrapper.optimizer)
        # as mmengine counts without: in the middle of an iteration
        done = (options.get('meta') or {}).get('iter', runner.iter + 1)
        folder, run = Path(out_dir), str(runner.message_hub.get_info(RUN))
        if self.in_parts:
            check_own_parts(self._sharded, done, state['state_dict'])
            self._state = write_parts(folder / filename, state, run)
        else:
            self._state = whole_state(state)
            if is_main_process():
                check_weights(self._sharded, done, self._state['state_dict'])
        try:
            options |= dict(file_client_args=file_client_args, save_optimizer=save_optimizer)
            save_first(out_dir, filename, **options)
        finally:
            self._state = {}
            # the folder of a file that was written again, or of one that could not be written
            if self.in_parts and is_main_process():
                remove_unnamed(folder, run)


def clip_grad_norm(
    parameters: Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, which takes parameters of one layout alone."""
    layouts: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            layout = parameter.device_mesh if isinstance(parameter, DTensor) else None
            layouts.setdefault(layout, []).append(parameter)
    gradients = [[p.grad for p in group if p.grad is not None] for group in layouts.values()]
    norms = [whole(get_total_norm(each, norm_type, foreach=foreach)) for each in gradients]
    total = get_total_norm(norms, norm_type, error_if_nonfinite)
    for group in layouts.values():
        clip_grads_with_norm_(group, max_norm, total, foreach)
    return total


def _exchange(
    optimizer: torch.optim.Optimizer, before: dict[str, nn.Parameter], now: dict[str, nn.Parameter]
) -> None:
    """Gives an optimizer parts of parameters for whole ones, and parts of what it knows of them."""
    parts: dict[Tensor, nn.Parameter] = {p: now[name] for name, p in before.items()}
    for group in optimizer.param_groups:
        group['params'] = [parts[p] for p in group['params']]
        # kernels for lists of tensors take one layout alone, and on CUDA torch takes them unasked
        group.update({name: False for name in KERNELS_FOR_LISTS if name in group})
    for p in [p for p in optimizer.state if p in parts]:
        part: Any = parts[p]
        state = optimizer.state.pop(p)
        for name, value in state.items() if isinstance(part, DTensor) else ():
            if isinstance(value, Tensor) and value.shape == part.shape:
                layout = part.device_mesh, part.placements
                state[name] = distribute_tensor(value, *layout, src_data_rank=None)
        optimizer.state[part] = state


def write_parts(file: Path, state: dict[str, Any], run: str) -> dict[str, Any]:
    """Writes the folder of a checkpoint, before its file; all processes have to call it."""
    tensors: dict[str, Tensor] = {}

    def left(path: Any, value: Any) -> Any:
        """A word in the place of each spread tensor."""
        if isinstance(value, DTensor):
            tensors[dotted(path)] = value.detach()
            return IN_PARTS
        return value.detach().cpu() if isinstance(value, Tensor) else value

    content = tree_map_with_path(left, state)
    names = [_make_folder(file, run) if is_main_process() else '']
    broadcast_object_list(names)
    partial, rank = file.with_name(f'.{names[0]}.part'), dist.get_rank()
    # of 256 MiB of whole tensors: torch has all that goes into a file in memory twice
    ends = zip(tensors, accumulate(tensor.nbytes for tensor in tensors.values()), strict=True)
    places = {name: 1 + end // (1 << 28) for name, end in ends}
    writer = HuggingFaceStorageWriter(str(partial), places, save_distributed=True)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        save(tensors, storage_writer=writer, planner=planner)
        own = {path.name: checksum(path) for path in partial.glob(f'shard-{rank + 1:05}-*')}
        by_rank = all_gather_object(own)
        if is_main_process():
            _check_seen(partial, by_rank)
            sync_folder(partial)
            partial.rename(file.with_name(names[0]))
            sync_folder(file.parent)
    except (CheckpointException, OSError) as error:
        with suppress(OSError):  # others may be faster
            delete_folder(partial)
        cause: BaseException = error
        if isinstance(error, CheckpointException):  # the same one on all processes
            rank, (cause, _) = next(iter(error.failures.items()))
        why = f'rank {rank}: {getattr(cause, "strerror", None) or cause}'
        raise SaveError(
            f'{file} could not be written ({why}); what was saved before is intact'
        ) from error
    files = {name: list(numbers) for files in by_rank for name, numbers in files.items()}
    return {**content, PARTS: {'folder': names[0], 'files': files}}


def _make_folder(file: Path, run: str) -> str:
    """The name that a folder will have, and the folder under the name until then."""
    names = (f'{file.stem}.{number}.sharded' for number in count(1))
    taken = {path.name.removeprefix('.').removesuffix('.part') for path in file.parent.iterdir()}
    name = next(name for name in names if name not in taken)
    (partial := file.with_name(f'.{name}.part')).mkdir()
    (partial / RUN_FILE).write_text(run)
    return name


def _check_seen(folder: Path, by_rank: list[dict[str, tuple[int, int]]]) -> None:
    """Refuses a folder in which the first process does not see what each has written."""
    for rank, files in enumerate(by_rank):
        for name, (size, _) in files.items():
            # asked by its name: a network's file system may remember a list of names for a while
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise OSError(
                    f'it does not see {path} as rank {rank} has written it: all processes have to '
                    'see the work dir'
                )


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece, where it is spread over processes; all of them have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Any) -> Any:
    """Whole tensors, on the processor, of a state in which some are spread."""
    return tree_map_only(Tensor, lambda tensor: whole(tensor).detach().cpu(), state)
