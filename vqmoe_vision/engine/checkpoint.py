"""Checkpoints are read as data, also by mmengine's own loaders.

No file runs code, none that fails its checksums is used, and texts of configs, which mmengine's
`resume` would run, are left out. A checkpoint in parts is a file, and a folder beside it with the
tensors that are spread: safetensors of torch's distributed checkpoint, and so no code. The file
says the size and the checksum of each of them, and has a word in the place of each tensor.
"""

import os
import re
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as upstream
from mmengine.utils import dl_utils
from timm.models import load_state_dict
from torch.distributed.checkpoint import DefaultLoadPlanner, HuggingFaceStorageReader
from torch.utils._pytree import tree_flatten_with_path, tree_map_with_path

from vqmoe_vision.models.compat import StateDict, refuse_without_values
from vqmoe_vision.models.fitting import transfer
from vqmoe_vision.models.layers import Transformer
from vqmoe_vision.models.moe_vit import SparseModel
from vqmoe_vision.models.normalization import KEY, Normalization
from vqmoe_vision.models.upcycle import read_upcycling
from vqmoe_vision.models.weights import (
    IN_PARTS,
    beside_weights,
    describe,
    lacks_tensors,
    load_content,
    network_of,
    reading,
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
# Of a checkpoint in parts, whose values are found by the keys that lead to them. States of an
# optimizer are six dictionaries deep and have a few values for each parameter.
_DEEPEST, _MOST_VALUES = 32, 1_000_000
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


def parts_of(content: Any) -> tuple[str, dict[str, list[int]]]:
    """The folder of a checkpoint, with size and checksum of each file in it; '' if in one piece."""
    if not isinstance(content, dict) or PARTS not in content:
        return '', {}
    folder, files = content[PARTS]['folder'], content[PARTS]['files']
    _require(all([_FOLDER.fullmatch(folder), *map(_FILE.fullmatch, files)]))
    return folder, files


def dotted(path: Any) -> str:
    """The name of a tensor in a checkpoint, by the keys and places that lead to it."""
    return '.'.join(str(getattr(step, 'key', getattr(step, 'idx', ''))) for step in path)


def _require(true: bool) -> None:
    if not true:
        raise UnpicklingError('not what a save in parts writes')


def _require_small_tree(content: Any) -> None:
    """Refuses what holds itself, or one list so often that a walk over all paths has no end."""
    containers, count = [(content, 0)], 0
    while containers:
        container, depth = containers.pop()
        values = container.values() if isinstance(container, dict) else container
        count += len(values)
        _require(depth < _DEEPEST and count < _MOST_VALUES)
        containers += [(v, depth + 1) for v in values if isinstance(v, dict | list | tuple)]


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
    log_notes(report.lines(), path)


def log_notes(notes: Sequence[str], source: str) -> None:
    """Logs what became of weights."""
    for note in notes:
        print_log(f'{source}: {note}', logger='current')


def read_state(path: str) -> StateDict:
    """Reads the weights of a file without running any code that it may hold."""
    file = weights_in(path)
    with _reading(file):
        state = load_state_dict(file, weights_only=True)
    refuse_without_values(state, file)
    if lacks_tensors(state):
        content = _load(file)
        kept = {name: content[name] for name in ('state_dict', PARTS) if name in content}
        state = _in_one_piece(kept or content, file)['state_dict']
    return state


def read_content(path: str, verify: bool = True) -> Any:
    """Reads all that a file holds, without running any code that it may hold."""
    file = weights_in(path)
    if file.endswith('.safetensors'):
        return {'state_dict': read_state(file)}
    content = _load(file, verify)
    return _in_one_piece(content, file) if verify else content


def classes_of(path: str) -> list[str]:
    """Names of the classes that a checkpoint, or a folder of timm, says; empty if it says none."""
    content = read_content(path, verify=False)
    meta = content.get('meta') if isinstance(content, dict) else None
    stated = ((meta or {}).get('dataset_meta') or {}).get('classes')
    return list(stated or describe(path).config.get('label_names') or ())


def check_content(path: str) -> None:
    """Compares all checksums of a checkpoint, also of the parts that lie beside it."""
    _checked_parts(_load(path), path)


def _load(file: str, verify: bool = True) -> Any:
    with _reading(file, verify):
        return load_content(file)


def _checked_parts(content: Any, file: str) -> tuple[Path, dict[str, list[int]]]:
    with _reading(file, verify=False):
        folder, files = parts_of(content)
    place = Path(file).parent / folder
    for name, stated in files.items():
        try:
            found = [*checksum(place / name)]
        except OSError:
            found = []
        if found != stated:
            raise ValueError(
                f'checkpoint {file!r} is damaged: {str(place / name)!r} is not there, or does not '
                'match its checksum'
            )
    return place, files


def _in_one_piece(content: Any, file: str) -> Any:
    place, files = _checked_parts(content, file)
    with _reading(file, verify=False):
        if files:
            _require_small_tree(content)
            _require({path.name for path in place.glob('*.safetensors')} == files.keys())
            reader = HuggingFaceStorageReader(str(place))
            metadata = reader.read_metadata()
            tensors: dict[str, Any] = {}
            for path, value in tree_flatten_with_path(content)[0]:
                if isinstance(value, str) and value == IN_PARTS:
                    part: Any = metadata.state_dict_metadata[dotted(path)]
                    _require(sum(c.sizes.numel() for c in part.chunks) == part.size.numel())
                    tensors[dotted(path)] = torch.zeros(part.size, dtype=part.properties.dtype)
            # as torch's `load`, which warns where a process has no group
            reader.set_up_storage_reader(metadata, is_coordinator=True)
            planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            planner.set_up_planner(tensors, metadata, is_coordinator=True)
            reader.read_data(planner.create_local_plan(), planner).wait()
            del content[PARTS]
            content = tree_map_with_path(lambda p, value: tensors.pop(dotted(p), value), content)
    inside = [content, *content.values()] if isinstance(content, dict) else []
    for state in (each for each in inside if isinstance(each, dict)):
        refuse_without_values(state, file)
        if lacks_tensors(state):
            raise ValueError(
                f'checkpoint {file!r} lacks tensors, and does not say which parts they are made '
                'of: tools/publish.py makes one file of the checkpoint that it was taken from'
            )
    return content


@contextmanager
def _reading(path: str, verify: bool = True) -> Iterator[None]:
    with as_data(), reading(path, verify):
        yield


def existing(filename: str) -> str:
    """The path of a checkpoint with the user's folder in it, which must be there."""
    path = os.path.expanduser(filename)
    if not os.path.exists(path):
        raise FileNotFoundError(f'checkpoint {path!r} does not exist')
    return path


def load_from_local(filename: str, map_location: Any) -> Any:
    """The loader of files that mmengine asks for, which reads them as data."""
    path = existing(filename)
    if os.path.isdir(path) or path.endswith('.safetensors') or describe(path).name:
        state, config = read_state(path), describe(path).config
        if {'mean', 'std'} <= config.keys():  # which timm keeps beside the weights
            state[KEY] = Normalization.of(config).values()
        return {'state_dict': state}
    with _reading(path):
        content = torch.load(path, map_location, weights_only=True)
    return _named_as_expected(_without_configs(_in_one_piece(content, path), path))


def _named_as_expected(content: dict) -> dict:
    """The weights where mmengine looks for them, or else takes everything for weights."""
    for name in _WEIGHTS:
        if isinstance(content.get(name), dict):
            others = {other: value for other, value in content.items() if other not in _WEIGHTS}
            return others | {'state_dict': content[name]}
    return content


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
    if 'meta' in content:
        content['meta'] = _plain(content['meta'], 'config', 'cfg')
    if 'message_hub' in content:
        hub = content['message_hub'] = _plain(content['message_hub'])
        if 'runtime_info' in hub:
            hub['runtime_info'] = _plain(hub['runtime_info'], 'cfg')
    return content


def _plain(value: Any, *others: str) -> dict:
    """A dictionary without methods of its own, which a file can give it; {} of a numpy record."""
    return {k: value[k] for k in value if k not in others} if isinstance(value, dict) else {}


for _prefix, _loader in list(CheckpointLoader._schemes.items()):
    _own = load_from_local if _prefix == '' else _guarded(_loader)
    CheckpointLoader.register_scheme(_prefix, _own, force=True)
    setattr(upstream, _loader.__name__, _own)  # where it is called by its name
for _module in (upstream, dl_utils, dl_utils.hub):
    _module.load_url = as_data()(_module.load_url)
if hasattr(upstream, '_safe_torch_load'):  # of onedl, which runs code that torch refuses
    upstream._safe_torch_load = as_data()(torch.load)
