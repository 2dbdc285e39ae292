"""Checkpoints are read as data: weights, and the log that mmengine leaves beside them.

`torch.load` refuses any type that it does not know. Of the packages named mmengine only the
onedl one says what else it writes, and leaves out the float32 scalars that mmseg's metrics are.
"""

import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer

from vqmoe_vision.models.transfer import Size, StateDict, fit_state
from vqmoe_vision.moe import restart


def _getattr(owner: object, name: str) -> Any:
    """What a log calls to name its means and minima; the real one reaches any code from there."""
    if owner is not HistoryBuffer:
        raise UnpicklingError(f'{name} of {owner!r} is not part of a log')
    return getattr(owner, name)


_NUMBERS = '?' + np.typecodes['AllInteger'] + np.typecodes['AllFloat']
_IN_A_LOG = [
    HistoryBuffer,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in _NUMBERS},
    # numpy's functions that rebuild an array and a scalar; their module depends on the version
    np.ndarray(0).__reduce__()[0],
    np.float32(0).__reduce__()[0],
]
# With their names: the onedl mmengine forgets after every checkpoint what was added without.
torch.serialization.add_safe_globals(
    [
        *((item, f'{item.__module__}.{item.__qualname__}') for item in _IN_A_LOG),
        (_getattr, 'builtins.getattr'),
    ]
)


def start_from(model: VisionTransformer, path: str) -> None:
    """Loads weights from elsewhere for a new training, and logs what became of them.

    Args:
        model: Takes what the file has for it; then its MoE layers start as for a new training.
        path: As `read_state`.

    Raises:
        ValueError: The file cannot be read or does not fit; names keys and shapes.
    """
    state, notes = fit_state(model, read_state(path), path, read_image_sizes(path))
    model.load_state_dict(state, strict=False)
    notes += [f'{path}: {note}' for note in restart(model)]
    for note in notes:
        print_log(note, logger='current')


def read_state(path: str) -> StateDict:
    """Reads the weights of a file without running any code that it may hold.

    Args:
        path: A .pth file of mmengine or timm, or a .safetensors file.

    Raises:
        ValueError: The file is missing, damaged, or holds more than weights.
    """
    if not Path(path).is_file():
        raise ValueError(f'checkpoint {path!r} does not exist')
    try:
        return load_state_dict(path, weights_only=True)
    except Exception as error:  # bytes of another format can make an unpickler fail in any way
        raise ValueError(
            f'checkpoint {path!r} is damaged, or holds more than weights and is not loaded'
        ) from error


def read_image_sizes(path: str) -> list[Size]:
    """Values of `img_size` in the config that mmengine saves beside the weights of a run.

    Args:
        path: As `read_state`, which has read it already.

    Returns:
        (height, width) each; empty for a file of others.
    """
    if path.endswith('.safetensors'):
        return []
    config = str(read_content(path).get('meta', {}).get('cfg', ''))
    found = re.findall(r'\bimg_size=(?:[(\[]\s*(\d+),\s*(\d+),?\s*[)\]]|(\d+))', config)
    return [(int(height or side), int(width or side)) for height, width, side in found]


def read_content(path: str) -> Any:
    """Reads all that a .pth file holds, without running any code that it may hold.

    Args:
        path: A .pth file.

    Raises:
        ValueError: The file is missing, damaged, or holds more than weights and a log.
    """
    if not Path(path).is_file():
        raise ValueError(f'checkpoint {path!r} does not exist')
    try:
        return torch.load(path, 'cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # bytes of another format can make an unpickler fail in any way
        raise ValueError(
            f'checkpoint {path!r} is damaged, or holds more than weights and is not loaded'
        ) from error
