"""Checkpoints are read as data, also by mmengine's own loaders.

No file runs code, none that fails its checksums is used, and texts of configs, which mmengine's
`resume` would run, are left out. A checkpoint in parts is a file, and a folder beside it with the
tensors that are spread: safetensors of torch's distributed checkpoint, and so no code. The file
says the size and the checksum of each of them, and has a word in the place of each tensor.
"""

import os
import re
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as upstream
from timm.models import load_state_dict
from torch.distributed.checkpoint import DefaultLoadPlanner, HuggingFaceStorageReader
from torch.utils._pytree import tree_flatten_with_path, tree_map_with_path

from vqmoe_vision.models.compat import StateDict, is_out_of_memory, refuse_without_values
from vqmoe_vision.models.fitting import transfer
from vqmoe_vision.models.layers import Transformer
from vqmoe_vision.models.moe_vit import SparseModel
from vqmoe_vision.models.normalization import KEY, Normalization
from vqmoe_vision.models.upcycle import read_upcycling
from vqmoe_vision.models.weights import (
    IN_PARTS,
    beside_weights,
    check_file,
    describe,
    lacks_tensors,
    network_of,
    source_of,
    unreadable,
    weights_in,
)

# Where the weights of a file are, those that count first: as timm's `load_state_dict` has it, so
# that what is tested is what a model that is built of the file has. mmengine's averages are in
# none of these, and its hook for them knows when they count.
_WEIGHTS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
PARTS = 'tensors_in_parts'
# of a checkpoint's name without .pth, and a number: a file that is written again has another folder
_FOLDER = re.compile(r'(?P<stem>[^/.][^/]*)\.\d+\.sharded')
_FILE = re.compile(r'shard-[\w-]+\.safetensors')
# In such a folder, and in the work dir: the run that has made it.
RUN_FILE = '.run_id'
# `torch.load` takes no file at all where both are set
_FORCED, _SWITCHED_OFF = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
_ENVIRONMENT = threading.RLock()


class _Log(HistoryBuffer):
    """A log while it is read. mmengine's own lets a file set the functions of all logs."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        numbers = ('_log_history', '_count_history')
        if not all(isinstance(state.get(name), np.ndarray) for name in numbers):
            raise UnpicklingError('a log without numbers')
        self._set_default_statistics()
        self.__dict__.update({name: state[name] for name in numbers})
        self.max_length = int(state['max_length'])
        self.__class__ = HistoryBuffer


torch.serialization.add_safe_globals(beside_weights(_Log))


@dataclass(frozen=True)
class Parts:
    """What a checkpoint says of its folder: its name, and sizes and checksums of its files."""

    folder: str
    files: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, content: Any) -> 'Parts | None':
        """What a checkpoint says; None where it is in one piece."""
        if not isinstance(content, dict) or PARTS not in content:
            return None
        folder, files = content[PARTS]['folder'], content[PARTS]['files']
        _require(all([_FOLDER.fullmatch(folder), *map(_FILE.fullmatch, files)]))
        return cls(folder, {name: (int(size), int(crc)) for name, (size, crc) in files.items()})

    def check(self, file: str) -> None:
        """Compares sizes and checksums of the files in the folder."""
        for name, expected in self.files.items():
            part = Path(file).parent / self.folder / name
            try:
                found = checksum(part)
            except OSError as error:
                raise ValueError(
                    f'checkpoint {file!r} is in parts, and {str(part)!r} cannot be read: '
                    f'{error.strerror}'
                ) from error
            if found != expected:
                raise ValueError(
                    f'checkpoint {file!r} is damaged: {str(part)!r} does not match its checksum'
                )

    def put_together(self, file: str, content: dict, under: str, device: Any) -> dict:
        """Puts whole tensors into the checkpoint, of all that is under a key, or of all."""
        folder = Path(file).parent / self.folder
        _require({path.name for path in folder.glob('*.safetensors')} == self.files.keys())
        reader = HuggingFaceStorageReader(str(folder))
        metadata = reader.read_metadata()
        tensors: dict[str, Any] = {}
        for path, value in tree_flatten_with_path(content)[0]:
            if not _is_word(value) or not (name := dotted(path)).startswith(under):
                continue
            tensor: Any = metadata.state_dict_metadata[name]
            _require(sum(chunk.sizes.numel() for chunk in tensor.chunks) == tensor.size.numel())
            tensors[name] = torch.zeros(tensor.size, dtype=tensor.properties.dtype)
        # as torch's `load`, which warns where a process has no group
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(tensors, metadata, is_coordinator=True)
        reader.read_data(planner.create_local_plan(), planner).wait()
        del content[PARTS]

        def put(path: Any, value: Any) -> Any:
            found = _is_word(value) and dotted(path) in tensors
            return tensors.pop(dotted(path)).to(device) if found else value

        return tree_map_with_path(put, content)


def dotted(path: Any) -> str:
    """The name of a tensor in a checkpoint, by the keys and places that lead to it."""
    return '.'.join(str(getattr(step, 'key', getattr(step, 'idx', ''))) for step in path)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value == IN_PARTS


def _require(true: bool) -> None:
    if not true:
        raise ValueError('not what a save in parts writes')


def checksum(path: Path) -> tuple[int, int]:
    """Size of a file in bytes, and its CRC-32."""
    size = crc = 0
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def owner_of(folder: str) -> str | None:
    """The checkpoint that a folder was written for; None if it is no folder of parts."""
    return f'{match["stem"]}.pth' if (match := _FOLDER.fullmatch(folder)) else None


def run_of(folder: Path) -> str | None:
    """The run that made a folder of parts; None if it does not say."""
    file = folder / RUN_FILE
    return file.read_text(errors='replace') if file.is_file() and not folder.is_symlink() else None


def delete_folder(folder: Path) -> None:
    """Deletes a folder of parts, but nothing in it that is of others."""
    for path in folder.iterdir():
        if path.is_file() and (_FILE.fullmatch(path.name) or path.name == RUN_FILE):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


@contextmanager
def as_data() -> Iterator[None]:
    """Lets `torch.load` read data alone, whatever its caller and the environment say."""
    with _ENVIRONMENT:  # of the whole process
        before = {name: os.environ.pop(name, None) for name in (_FORCED, _SWITCHED_OFF)}
        os.environ[_FORCED] = '1'
        try:
            yield
        finally:
            del os.environ[_FORCED]
            os.environ.update({name: value for name, value in before.items() if value is not None})


def start_from(model: Transformer, path: str) -> None:
    """Loads weights from elsewhere for a new training, and logs what became of them."""
    how = read_upcycling(model.upcycling) if isinstance(model, SparseModel) else None
    state, report = transfer(model, read_state(path), path, (), how, network_of(path))
    model.load_state_dict(state, strict=False)
    if isinstance(model, SparseModel):
        model.weights_report = report
    _log(report.lines(), path)


def log_weights(model: Any, arguments: dict[str, Any]) -> None:
    """Logs what became of the weights that a model was built with, if there are some."""
    if (report := getattr(model, 'weights_report', None)) is not None:
        _log(report.lines(), arguments.get('checkpoint_path') or source_of(model.pretrained_cfg))


def _log(notes: Sequence[str], source: str) -> None:
    for note in notes:
        print_log(f'{source}: {note}', logger='current')


def read_state(path: str) -> StateDict:
    """Reads the weights of a file without running any code that it may hold."""
    file = weights_in(path)
    with _reading(file):
        state = load_state_dict(file, weights_only=True)
    refuse_without_values(state, file)
    if lacks_tensors(state):
        return _in_one_piece(_load(file), file, 'state_dict.')['state_dict']
    return state


def read_content(path: str, verify: bool = True) -> Any:
    """Reads all that a file holds, without running any code that it may hold."""
    file = weights_in(path)
    if file.endswith('.safetensors'):
        return {'state_dict': read_state(file)}
    content = _load(file, verify)
    return _in_one_piece(content, file) if verify else content


def check_content(path: str) -> None:
    """Compares all checksums of a checkpoint, also of the parts that lie beside it."""
    _checked_parts(_load(path), path)


def _load(file: str, verify: bool = True) -> Any:
    with _reading(file, verify):
        return torch.load(file, 'cpu', weights_only=True, mmap=zipfile.is_zipfile(file))


def _checked_parts(content: Any, file: str) -> Parts | None:
    with _reading(file, verify=False):
        parts = Parts.of(content)
    if parts is not None:
        parts.check(file)
    return parts


def _in_one_piece(content: Any, file: str, under: str = '', device: Any = None) -> Any:
    parts = _checked_parts(content, file)
    if parts is not None:
        with _reading(file, verify=False):
            content = parts.put_together(file, content, under, device)
    _check_tensors(content, file, device)
    return content


def _check_tensors(content: Any, file: str, device: Any) -> None:
    """Refuses weights without values, or taken out of a checkpoint in parts without its parts."""
    for state in [content, *content.values()] if isinstance(content, dict) else []:
        if not isinstance(state, dict):
            continue
        if device is None or torch.device(device).type != 'meta':  # none has any there, by wish
            refuse_without_values(state, file)
        if lacks_tensors(state):
            raise ValueError(
                f'checkpoint {file!r} lacks tensors, and does not say which parts they are made '
                'of: tools/publish.py makes one file of the checkpoint that it was taken from'
            )


@contextmanager
def _reading(path: str, verify: bool = True) -> Iterator[None]:
    """Verifies the checksums of a file before it is read, and names the file where that fails."""
    if verify:
        check_file(path)
    elif not Path(path).is_file():
        raise ValueError(f'checkpoint {path!r} does not exist')
    try:
        with as_data():
            yield
    except Exception as error:  # bytes of another format can make an unpickler fail in any way
        if is_out_of_memory(error):  # the file may well be whole
            raise
        raise ValueError(unreadable(path)) from error


def load_from_local(filename: str, map_location: Any) -> Any:
    """The loader of files that mmengine asks for, which reads them as data."""
    path = os.path.expanduser(filename)
    if not os.path.exists(path):
        raise FileNotFoundError(f'checkpoint {path!r} does not exist')
    if os.path.isdir(path) or path.endswith('.safetensors') or describe(path).name:
        state, config = read_state(path), describe(path).config
        if {'mean', 'std'} <= config.keys():  # which timm keeps beside the weights
            state[KEY] = Normalization.of(config).values()
        return {'state_dict': state}
    with _reading(path):
        content = torch.load(path, map_location, weights_only=True)
    # what else torch takes for it says where a file's devices are, and parts were on the processor
    device = map_location if isinstance(map_location, str | torch.device) else None
    content = _in_one_piece(content, path, device=device)
    return _named_as_expected(_without_configs(content, path))


def _named_as_expected(content: dict) -> dict:
    """The weights where mmengine looks for them, or else takes everything for weights."""
    for name in _WEIGHTS:
        if isinstance(content.get(name), dict):
            others = {other: value for other, value in content.items() if other not in _WEIGHTS}
            return {**others, 'state_dict': content[name]}
    return content


@as_data()
def _load_as_data(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    return torch.load(file, map_location, weights_only=True)


def _guarded(loader: Callable[..., Any]) -> Callable[..., Any]:
    """A loader of mmengine, such as that of addresses, that reads data alone."""

    @as_data()
    @wraps(loader)
    def load(filename: str, *args: Any, **kwargs: Any) -> Any:
        return _named_as_expected(_without_configs(loader(filename, *args, **kwargs), filename))

    return load


def _without_configs(content: Any, path: str) -> dict:
    """Takes out the texts of configs that mmengine would run, whatever they say."""
    if not isinstance(content, dict):
        raise ValueError(f'checkpoint {path!r} is a {type(content).__name__} and no dictionary')
    content = _plain(content)
    places = [('meta', 'config'), ('meta', 'cfg'), ('message_hub', 'runtime_info', 'cfg')]
    for *holders, name in places:
        holder = content
        for key in holders:
            if key not in holder:
                break
            holder[key] = _plain(holder[key])
            holder = holder[key]
        else:
            holder.pop(name, None)
    return content


def _plain(value: Any) -> dict:
    """A dictionary without methods of its own, which a file can give it; {} of a numpy record."""
    return {key: value[key] for key in value} if isinstance(value, dict) else {}


for _prefix, _loader in list(CheckpointLoader._schemes.items()):
    _own = load_from_local if _prefix == '' else _guarded(_loader)
    CheckpointLoader.register_scheme(_prefix, _own, force=True)
    setattr(upstream, _loader.__name__, _own)  # where it is called by its name
if hasattr(upstream, '_safe_torch_load'):  # of onedl, which runs code that torch refuses
    upstream._safe_torch_load = _load_as_data
