"""Which weights a run starts from, by what they are and not by the name of their file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import sha256

import torch
from mmengine.config import ConfigDict

from vqmoe_vision.models.state_dicts import StateDict
from vqmoe_vision.models.weight_files import SUFFIXES, describe

from .checkpoint import read_state
from .options import flat


def starting_weights(model: ConfigDict) -> dict[str, str]:
    """Digests of all weights on this machine that the config of a model names.

    A checkpoint also holds when and how it was made, which another training of the same model does
    not repeat: the digest is of the names and values of its weights alone.

    Args:
        model: The entry `model` of a config, in which a file may be a checkpoint to start from, a
            teacher, or a network whose features are taken.

    Returns:
        Digest by dotted name of the option; empty for a training from nothing. Weights that a
        library would fetch are not among them.

    Raises:
        ValueError: A file is damaged, or holds more than weights.
    """
    return {name: _digest(read_state(path)) for name, path in _files(model)}


def _files(model: ConfigDict) -> Iterator[tuple[str, str]]:
    for name, value in flat(model.to_dict(), 'model').items():
        there = isinstance(value, str) and os.path.exists(value)
        if there and (value.endswith(SUFFIXES) or describe(value).name):
            yield name, value


def _digest(state: StateDict) -> str:
    digest = sha256()
    for name, value in sorted(state.items()):
        digest.update(f'{name} {value.dtype} {list(value.shape)}\n'.encode())
        # numpy has no bfloat16
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
