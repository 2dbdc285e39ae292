"""Which weights a run starts from, by what they are and not by the name of their file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any

import torch
from mmengine.config import ConfigDict

from vqmoe_vision.models.state_dicts import StateDict
from vqmoe_vision.models.weight_files import OF_TIMM, is_file_name

from .checkpoint import read_state
from .options import flat

# Options of models, and of a `pretrained_cfg_overlay`, whose files are weights under any name.
_NAME_WEIGHTS = ('checkpoint', 'checkpoint_path', 'features', 'file', 'load_from', 'upcycle')
_FOLDER = 'local-dir:'  # before a folder of timm


def starting_weights(model: ConfigDict, load_from: str | None = None) -> dict[str, str]:
    """Digests of all weights on this machine that the config of a run names."""
    named = {**flat(model.to_dict(), 'model'), 'load_from': load_from}
    return {name: digest_of(read_state(path)) for name, path in _weights(named)}


def _weights(named: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in named.items():
        if not isinstance(value, str):
            continue
        path = os.path.expanduser(value.removeprefix(_FOLDER))
        meant = name.rpartition('.')[2] in _NAME_WEIGHTS or is_file_name(path)
        # not any folder: an entry point may be called as one is
        files = [path] if meant else []
        files += [os.path.join(path, file) for file in OF_TIMM]
        if any(map(os.path.isfile, files)):
            yield name, path


def digest_of(state: StateDict) -> str:
    """What tells weights from others: 16 digits of the sha256 of their names and values."""
    digest = sha256()
    for name, value in sorted(state.items()):
        digest.update(f'{name} {value.dtype} {list(value.shape)}\n'.encode())
        # numpy has no bfloat16
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
