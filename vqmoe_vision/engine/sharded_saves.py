"""How all processes write the checkpoints of a spread model: in one piece, or in parts."""

from contextlib import suppress
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.dist import all_gather_object, broadcast_object_list, is_main_process
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from vqmoe_vision.models.weights import IN_PARTS

from .checkpoint_files import RUN, SaveError, reason_of, remove_unnamed, sync_folder
from .finite import check_own_parts, check_weights
from .parts import KEY, RUN_FILE, checksum, delete_folder

# Options of an optimizer for kernels that take lists of tensors of one layout.
KERNELS_FOR_LISTS = ('foreach', 'fused')
# Bytes of whole tensors, of which each process writes its part.
_FILE_SIZE = 1 << 28


def with_kernels(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What is saved of an optimizer, with the kernels that a model has which is not spread."""
    for group in state['param_groups']:
        group.update({n: optimizer.defaults[n] for n in KERNELS_FOR_LISTS if n in group})
    return state


class JointSaves:
    """A save in which all processes of a spread model take part.

    They put it together for the file that the first one writes, or each writes its parts first.
    """

    def __init__(self, runner: Runner, model: nn.Module, in_parts: bool) -> None:
        self._runner, self._model, self._in_parts = runner, model, in_parts
        self._save = runner.save_checkpoint
        # what belongs to all processes, for the place of what the first one has
        self.state: dict[str, Any] = {}

    def __call__(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        save_optimizer: bool = True,
        **options: Any,
    ) -> None:
        """Saves, as the runner's method does."""
        state: dict[str, Any] = {'state_dict': self._model.state_dict()}
        if save_optimizer:
            wrapper = self._runner.optim_wrapper
            state['optimizer'] = with_kernels(wrapper.state_dict(), wrapper.optimizer)
        # as mmengine counts without: in the middle of an iteration
        done = (options.get('meta') or {}).get('iter', self._runner.iter + 1)
        folder, run = Path(out_dir), str(self._runner.message_hub.get_info(RUN))
        if self._in_parts:
            check_own_parts(self._model, done, state['state_dict'])
            self.state = write_parts(folder / filename, state, run)
        else:
            self.state = whole_state(state)
            if is_main_process():
                check_weights(self._model, done, self.state['state_dict'])
        try:
            self._save(out_dir, filename, file_client_args, save_optimizer, **options)
        finally:
            self.state = {}
            # the folder of a file that was written again, or of one that could not be written
            if self._in_parts and is_main_process():
                remove_unnamed(folder, run, {filename})


def write_parts(file: Path, state: dict[str, Any], run: str) -> dict[str, Any]:
    """Writes the folder of a checkpoint, before its file; all processes have to call it."""
    tensors: dict[str, Tensor] = {}
    left = _take_parts(state, '', tensors)
    name = [_make_folder(file, run) if is_main_process() else '']
    broadcast_object_list(name)
    partial, rank = file.with_name(f'.{name[0]}.part'), dist.get_rank()
    writer = HuggingFaceStorageWriter(str(partial), _in_files(tensors), save_distributed=True)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        save(tensors, storage_writer=writer, planner=planner)
        own = {path.name: checksum(path) for path in partial.glob(f'shard-{rank + 1:05}-*')}
        by_rank: list[dict[str, tuple[int, int]]] = all_gather_object(own)
        if is_main_process():
            _check_seen(partial, by_rank)
            sync_folder(partial)
            partial.rename(file.with_name(name[0]))
            sync_folder(file.parent)
    except (CheckpointException, OSError) as error:
        with suppress(OSError):  # others may be faster
            delete_folder(partial)
        cause: BaseException = error
        if isinstance(error, CheckpointException):  # the same one on all processes
            rank, (cause, _) = next(iter(error.failures.items()))
        raise SaveError(
            f'{file} could not be written (rank {rank}: {reason_of(cause)}); what was saved before '
            'is intact'
        ) from error
    files = {name: list(numbers) for files in by_rank for name, numbers in files.items()}
    return {**left, KEY: {'folder': name[0], 'files': files}}


def _in_files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of the file for each tensor: torch has all that goes into one in memory twice."""
    ends = accumulate(tensor.nbytes for tensor in tensors.values())
    return {name: 1 + end // _FILE_SIZE for name, end in zip(tensors, ends, strict=True)}


def _make_folder(file: Path, run: str) -> str:
    """The name that a folder will have, and the folder under the name until then."""
    for number in count(1):
        name = f'{file.stem}.{number}.sharded'
        partial = file.with_name(f'.{name}.part')
        if not file.with_name(name).exists() and not partial.exists():
            partial.mkdir()
            (partial / RUN_FILE).write_text(run)
            return name
    raise AssertionError('numbers do not end')


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


def _take_parts(state: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A state with a word in the place of each spread tensor, which are collected by name."""
    if isinstance(state, DTensor):
        assert name not in tensors
        tensors[name] = state.detach()
        return IN_PARTS
    if isinstance(state, Tensor):
        return state.detach().cpu()
    before = f'{name}.' if name else ''
    if isinstance(state, dict):
        return {k: _take_parts(v, f'{before}{k}', tensors) for k, v in state.items()}
    if isinstance(state, list):
        return [_take_parts(v, f'{before}{i}', tensors) for i, v in enumerate(state)]
    return state


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece, where it is spread over processes; all of them have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Any) -> Any:
    """Whole tensors, on the processor, of a state in which some are spread."""
    if isinstance(state, Tensor):
        return whole(state).detach().cpu()
    if isinstance(state, dict):
        return {key: whole_state(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole_state(value) for value in state]
    return state
