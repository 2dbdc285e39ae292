"""Checkpoints in parts: a file, and a folder of torch's distributed checkpoint beside it.

The folder's pickled `.metadata` is never read: the file says which bytes a tensor is made of.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from vqmoe_vision.models.weights import IN_PARTS

KEY = 'tensors_in_parts'
# of a checkpoint's name without .pth, and a number: a file that is written again has another folder
_FOLDER = re.compile(r'(?P<stem>[^/]+)\.\d+\.sharded')
_FILES = re.compile(r'__\d+_\d+\.distcp|\.metadata|\.run_id')
# In such a folder, and in the work dir: the run that has made it.
RUN_FILE = '.run_id'
_BLOCK = 1 << 20
_Key = str | int


@dataclass(frozen=True)
class Parts:
    """What a checkpoint says of its folder."""

    folder: str
    files: dict[str, tuple[int, int]]
    metadata: Metadata
    places: dict[str, tuple[_Key, ...]]

    def as_data(self) -> dict[str, Any]:
        """What `of` reads: numbers, words and dtypes."""
        tensors = {}
        for name, place in self.places.items():
            tensor = self.metadata.state_dict_metadata[name]
            assert isinstance(tensor, TensorStorageMetadata)
            stored = [
                self.metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                for chunk in tensor.chunks
            ]
            tensors[name] = {
                'place': list(place),
                'dtype': tensor.properties.dtype,
                'size': list(tensor.size),
                'chunks': [
                    [list(c.offsets), list(c.sizes), s.relative_path, s.offset, s.length]
                    for c, s in zip(tensor.chunks, stored, strict=True)
                ],
            }
        files = {name: list(numbers) for name, numbers in self.files.items()}
        return {'folder': self.folder, 'files': files, 'tensors': tensors}

    @classmethod
    def of(cls, content: Any) -> 'Parts | None':
        """What a checkpoint says; None where it is in one piece."""
        if not isinstance(content, dict) or KEY not in content:
            return None
        data = content[KEY]
        _require(_FOLDER.fullmatch(data['folder']) and not data['folder'].startswith('.'))
        files = {name: (int(size), int(crc)) for name, (size, crc) in data['files'].items()}
        _require(all(_FILES.fullmatch(name) for name in files))
        places: dict[str, tuple[_Key, ...]] = {}
        described: dict[str, Any] = {}
        stored = {}
        for name, tensor in data['tensors'].items():
            size, chunks = torch.Size(tensor['size']), []
            for offsets, sizes, file, offset, length in tensor['chunks']:
                _require(file in files and 0 <= offset <= offset + length <= files[file][0])
                bounds = zip(offsets, sizes, size, strict=True)
                _require(all(0 <= first <= first + count <= end for first, count, end in bounds))
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                stored[MetadataIndex(name, offsets)] = _StorageInfo(file, offset, length)
            _require(sum(prod(chunk.sizes) for chunk in chunks) == prod(size))
            _require(isinstance(tensor['dtype'], torch.dtype))
            properties = TensorProperties(dtype=tensor['dtype'])
            described[name] = TensorStorageMetadata(properties, size, chunks)
            places[name] = tuple(tensor['place'])
        return cls(data['folder'], files, Metadata(described, storage_data=stored), places)

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

    def put_together(self, file: str, content: dict, under: str | None = None) -> dict:
        """Puts whole tensors into the checkpoint."""
        places = {n: p for n, p in self.places.items() if under is None or p[0] == under}
        wanted = {name: self.metadata.state_dict_metadata[name] for name in places}
        tensors = _read(Path(file).parent / self.folder, self.metadata, wanted)
        for name, place in places.items():
            holder, key = _entry(content, place)
            _require(holder[key] == IN_PARTS)
            holder[key] = tensors.pop(name)
        del content[KEY]
        return content

    def move(self, content: dict, device: Any) -> None:
        """Copies to a device, one after the other, what has been put together."""
        for place in self.places.values():
            holder, key = _entry(content, place)
            holder[key] = holder[key].to(device)


def _entry(content: Any, place: tuple[_Key, ...]) -> tuple[Any, _Key]:
    """What holds a tensor, and under which key."""
    *holders, last = place
    for key in holders:
        content = content[key]
    return content, last


def _read(folder: Path, metadata: Metadata, wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    """Whole tensors by name, which torch reads without a word of the folder's own `.metadata`."""
    tensors: dict[str, Any] = {
        name: torch.zeros(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in wanted.items()
    }
    reader = FileSystemReader(folder)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(tensors, metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()
    return tensors


def _require(true: Any) -> None:
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
        if path.is_file() and _FILES.fullmatch(path.name.removesuffix('.tmp')):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
