"""How all processes write the checkpoints of a spread model: in one piece, or in parts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.dist import all_gather_object, is_main_process
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, Metadata, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor

from vqmoe_vision.models.weights import IN_PARTS

from .checkpoint_files import RUN, SaveError, reason_of, remove_unnamed, sync_folder
from .finite import check_own_parts, check_weights
from .parts import KEY, RUN_FILE, Parts, checksum, delete_folder

# Options of an optimizer for kernels that take lists of tensors of one layout.
KERNELS_FOR_LISTS = ('foreach', 'fused')


def with_kernels(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What is saved of an optimizer, with the kernels that a model has which is not spread."""
    for group in state['param_groups']:
        group.update({n: optimizer.defaults[n] for n in KERNELS_FOR_LISTS if n in group})
    return state


class WholeSaves:
    """A save before which all processes put their parts together, for a file of whole tensors."""

    def __init__(self, runner: Runner, model: nn.Module) -> None:
        self._runner, self._model = runner, model
        self._save = runner.save_checkpoint
        self._state: dict[str, Any] = {}

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
        self._state = self._prepare(Path(out_dir) / filename, state, done)
        try:
            self._save(out_dir, filename, file_client_args, save_optimizer, **options)
        finally:
            self._state = {}

    def fill(self, checkpoint: dict) -> None:
        """Puts what belongs to all processes in the place of what the first one has."""
        checkpoint.update(self._state)

    def _prepare(self, file: Path, state: dict[str, Any], done: int) -> dict[str, Any]:
        state = whole_state(state)
        if is_main_process():
            check_weights(self._model, done, state['state_dict'])
        return state


class SavesInParts(WholeSaves):
    """A save in which each process writes what it has, by torch's distributed checkpoint."""

    def __call__(self, out_dir: str, filename: str, *args: Any, **options: Any) -> None:
        """Saves, as the runner's method does."""
        try:
            super().__call__(out_dir, filename, *args, **options)
        finally:
            # the folder of a file that was written again, or of one that could not be written
            if is_main_process():
                remove_unnamed(Path(out_dir), self._run(), {filename})

    def _prepare(self, file: Path, state: dict[str, Any], done: int) -> dict[str, Any]:
        check_own_parts(self._model, done, state['state_dict'])
        return write_parts(file, state, self._run())

    def _run(self) -> str:
        return str(self._runner.message_hub.get_info(RUN))


def write_parts(file: Path, state: dict[str, Any], run: str) -> dict[str, Any]:
    """Writes the folder of a checkpoint, before its file; all processes have to call it."""
    places: dict[str, tuple] = {}
    tensors: dict[str, Tensor] = {}
    left = _take_parts(state, (), places, tensors)
    name = _decided(_free_name(file) if is_main_process() else '')
    partial = file.with_name(f'.{name}.part')
    metadata = _write(partial, tensors, file, run)
    files = _name_folder(partial, file.with_name(name), file)
    return {**left, KEY: Parts(name, files, metadata, places).as_data()}


def _free_name(file: Path) -> str:
    number = 1
    while True:
        name = f'{file.stem}.{number}.sharded'
        if not any(file.with_name(taken).exists() for taken in (name, f'.{name}.part')):
            return name
        number += 1


def _write(folder: Path, tensors: dict[str, Tensor], file: Path, run: str) -> Metadata:
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = FileSystemWriter(folder)
    writer.fs = _FileSystem(run)
    try:
        return save(tensors, storage_writer=writer, planner=planner)
    except CheckpointException as error:  # the same one on all processes, and no `Exception`
        _discard(folder)
        rank, (cause, _) = next(iter(error.failures.items()))
        raise SaveError(
            f'{file} could not be written (rank {rank}: {reason_of(cause)}); what was saved before '
            'is intact'
        ) from error


class _FileSystem(FileSystem):
    def __init__(self, run: str) -> None:
        self._run = run

    def mkdir(self, path: str | os.PathLike) -> None:
        super().mkdir(path)
        if is_main_process():
            (Path(path) / RUN_FILE).write_text(self._run)

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        assert mode == 'wb'
        with _Stream(FileIO(path, mode)) as stream:
            yield stream


class _Stream(BufferedWriter):
    """A file that may be flushed once more when it is closed, which torch's writer does."""

    def flush(self) -> None:
        if not self.closed:
            super().flush()


def _name_folder(partial: Path, folder: Path, file: Path) -> dict[str, tuple[int, int]]:
    """Gives a folder its name once the first process sees all of it; returns all files."""
    written: dict[str, tuple[int, int]] = {}
    problem = ''
    try:
        own = [partial / '.metadata'] if is_main_process() else []
        own += partial.glob(f'__{dist.get_rank()}_*')
        written = {path.name: checksum(path) for path in own}
    except OSError as error:
        problem = f'rank {dist.get_rank()}: {error.strerror}'
    found = all_gather_object((written, problem))
    problem = next((said for _, said in found if said), '')
    by_rank = [files for files, _ in found]
    if is_main_process():
        problem = _decided(problem or _unseen(partial, by_rank) or _rename(partial, folder))
    else:
        problem = _decided('')
    if problem:
        _discard(partial)
        raise SaveError(f'{file} could not be written ({problem}); what was saved before is intact')
    return {name: numbers for files in by_rank for name, numbers in files.items()}


def _unseen(folder: Path, by_rank: list[dict[str, tuple[int, int]]]) -> str:
    """What the first process does not see of the files that each has written."""
    for rank, files in enumerate(by_rank):
        for name, (size, _) in files.items():
            path = folder / name
            # asked by its name: a network's file system may remember a list of names for a while
            try:
                seen = path.stat().st_size == size
            except OSError:
                seen = False
            if not seen:
                return (
                    f'rank 0 does not see {path} as rank {rank} has written it: all processes '
                    'have to see the work dir'
                )
    return ''


def _rename(partial: Path, folder: Path) -> str:
    """Why it cannot be done."""
    sync_folder(partial)
    try:
        partial.rename(folder)
    except OSError as error:
        return f'rank 0: {error.strerror}'
    sync_folder(folder.parent)
    return ''


def _discard(partial: Path) -> None:
    """Deletes a folder, also where each process has its own."""
    with suppress(OSError):  # others may be faster
        delete_folder(partial)


def _take_parts(state: Any, place: tuple, places: dict, tensors: dict) -> Any:
    """A state with a word in the place of each spread tensor, which are collected by name."""
    if isinstance(state, DTensor):
        name = '.'.join(map(str, place))
        assert name not in places
        places[name], tensors[name] = place, state.detach()
        return IN_PARTS
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {k: _take_parts(v, (*place, k), places, tensors) for k, v in state.items()}
    if isinstance(state, list):
        return [_take_parts(v, (*place, i), places, tensors) for i, v in enumerate(state)]
    return state


def _decided(of_first: Any) -> Any:
    values = [of_first]
    dist.broadcast_object_list(values)
    return values[0]


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
