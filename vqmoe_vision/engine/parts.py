"""Checkpoints in parts: a file, and a folder beside it with the tensors that are spread.

The folder holds safetensors of torch's distributed checkpoint, and so no code. The file says the
size and the checksum of each of them, and has a word in the place of each tensor.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, HuggingFaceStorageReader

from vqmoe_vision.models.weights import IN_PARTS

KEY = 'tensors_in_parts'
# of a checkpoint's name without .pth, and a number: a file that is written again has another folder
_FOLDER = re.compile(r'(?P<stem>[^/.][^/]*)\.\d+\.sharded')
_FILE = re.compile(r'shard-[\w-]+\.safetensors')
# In such a folder, and in the work dir: the run that has made it.
RUN_FILE = '.run_id'
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Parts:
    """What a checkpoint says of its folder: its name, and sizes and checksums of its files."""

    folder: str
    files: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, content: Any) -> 'Parts | None':
        """What a checkpoint says; None where it is in one piece."""
        if not isinstance(content, dict) or KEY not in content:
            return None
        folder, files = content[KEY]['folder'], content[KEY]['files']
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
        places = {name: place for name, *place in _words(content) if name.startswith(under)}
        tensors: dict[str, Any] = {}
        for name in places:
            tensor: Any = metadata.state_dict_metadata[name]
            _require(sum(chunk.sizes.numel() for chunk in tensor.chunks) == tensor.size.numel())
            tensors[name] = torch.zeros(tensor.size, dtype=tensor.properties.dtype)
        # as torch's `load`, which warns where a process has no group
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(tensors, metadata, is_coordinator=True)
        reader.read_data(planner.create_local_plan(), planner).wait()
        for name, (holder, key) in places.items():
            holder[key] = tensors.pop(name).to(device)
        del content[KEY]
        return content


def _words(state: Any, name: str = '') -> Iterator[tuple[str, Any, Any]]:
    """Where a state has a word in the place of a tensor: its name, what holds it, its key."""
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        inside = f'{name}.{key}' if name else str(key)
        if isinstance(value, dict | list):
            yield from _words(value, inside)
        elif isinstance(value, str) and value == IN_PARTS:
            yield inside, state, key


def _require(true: bool) -> None:
    if not true:
        raise ValueError('not what a save in parts writes')


def checksum(path: Path) -> tuple[int, int]:
    """Size of a file in bytes, and its CRC-32."""
    size = crc = 0
    with path.open('rb') as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def owner_of(folder: str) -> str | None:
    """The checkpoint that a folder was written for; None if it is no folder of parts."""
    match = _FOLDER.fullmatch(folder)
    return f'{match["stem"]}.pth' if match else None


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
