"""Files of weights before they are read."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..moe.config import check
from .run_files import logs_passed_over
from .state_dicts import shorten

# How the archives begin that torch writes.
_ZIP = b'PK\x03\x04'
_OF_TORCH = ('.pth', '.pt', '.bin', '.tar', '.ckpt')
SUFFIXES = (*_OF_TORCH, '.safetensors')
# Of the files that timm reads from a folder.
_OF_FOLDERS = ('.safetensors', '.pth', '.pth.tar', '.bin')
# Of files of JAX in their own names, which a dense model of timm translates.
_OF_NUMPY = ('.npz', '.npy')
# What timm's `save_for_hf` writes, in the order in which timm reads it.
OF_TIMM = ('model.safetensors', 'pytorch_model.bin')
# timm's description beside them, in which `publish` leaves the digest of the first one.
CONFIG, DIGEST = 'config.json', 'weights_sha256'
# Names of the parts that other libraries split large weights into, with an index beside them.
_PART = re.compile(r'-\d+-of-(?!0*1\.)\d+\.')
# What a file has in the place of a tensor that lies in a folder beside it.
IN_PARTS = 'in the folder beside this file'
# Errors that say themselves, in a line, what is wrong.
_SAID = (ValueError, TypeError, AssertionError)
Result = TypeVar('Result')
# What begins a file of torch before 1.6, in a pickle.
_OF_OLD = torch.serialization.MAGIC_NUMBER.to_bytes(10, 'little')
_NO_CHECKSUMS = (
    '%s: it is of the format of torch before 1.6, which has no checksums: a flipped bit goes unseen'
)
_logger = logging.getLogger(__name__)


class _Elsewhere(Exception):
    """Carries what was raised while weights were read, and not by the reading of them."""


def is_file_name(source: str) -> bool:
    """Whether a source is called as a file of weights is, wherever it lies."""
    return source.endswith('.safetensors') or source.lower().endswith(_OF_TORCH)


def is_of_numpy(path: str) -> bool:
    """Whether a file is one of NumPy by its name."""
    return path.lower().endswith(_OF_NUMPY)


def weights_in(source: str) -> str:
    """The file of weights in a folder of timm."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    found = [folder / name for name in OF_TIMM if (folder / name).is_file()]
    if not found:
        for file in sorted(folder.iterdir()):
            check_whole(str(file))
        raise ValueError(f'folder {source!r} has no weights of timm: {" or ".join(OF_TIMM)}')
    return str(found[0])


@contextmanager
def named_source(source: str) -> Iterator[None]:
    """Say in one line that weights cannot be read, whatever the file or the hub raises."""
    # torch reads a file of any name
    local = is_file_name(source) or Path(source).exists()
    if local:
        check_files(source)
    try:
        with logs_passed_over():
            yield
    except _Elsewhere as other:
        raise other.args[0] from other.args[0].__cause__
    except Exception as error:  # bytes and networks can fail in any way
        if type(error) in _SAID or is_out_of_memory(error):  # the file may well be whole
            raise
        reason = first_line(error)
        # torch's and timm's words for a file are advice to run the code in it, or no words at all
        if local or 'weights_only' in reason:
            raise ValueError(unreadable(source)) from error
        raise ValueError(
            f'weights of {source!r} cannot be read: {reason.rstrip(".")}; a file of them needs no '
            'network: upcycle=FILE, in a config model.pretrained=False model.checkpoint=FILE'
        ) from error


def no_reading(function: Callable[..., Result], what: str = '') -> Callable[..., Result]:
    """The same function, whose errors `named_source` takes for none of the file."""

    def call(*args: Any, **kwargs: Any) -> Result:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not what or type(error) in _SAID or is_out_of_memory(error):
                raise _Elsewhere(error) from error
            raise ValueError(f'{what}: {named_reason(error)}') from error

    return call


def first_line(error: Exception) -> str:
    """What an error says in its first line, or its kind if it says nothing."""
    return next(iter(str(error).splitlines()), '') or type(error).__name__


def named_reason(error: Exception) -> str:
    """The kind of an error, and what it says in its first line."""
    return ': '.join([type(error).__name__, *str(error).splitlines()[:1]])


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was missing, whatever was to be done with it."""
    # what torch raises on the processor has no type of its own
    of_torch = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return of_torch or isinstance(error, MemoryError | torch.OutOfMemoryError)


def unreadable(path: str) -> str:
    """What to say of a file whose bytes are no weights of torch."""
    if is_of_numpy(path):
        return (
            f'checkpoint {path!r} is of NumPy, which a dense model of timm alone reads, by '
            f'timm.create_model(DENSE, checkpoint_path={path!r}): save its state dict with '
            'torch.save for upcycle=FILE or checkpoint=FILE, or call convert_to_moe with the model'
        )
    return (
        f'checkpoint {path!r} is damaged, or holds more than weights and is not loaded, as it may '
        'run code: save its state_dict() alone'
    )


def lacks_tensors(state: Mapping[str, Any]) -> bool:
    """Whether a file has words in the place of some tensors."""
    return any(isinstance(value, str) and value == IN_PARTS for value in state.values())


def check_in_one_piece(state: Mapping[str, Any], source: str) -> None:
    """Refuse weights of which a run has written the parts of its processes."""
    if lacks_tensors(state):
        raise ValueError(
            f'checkpoint {source!r} is in parts, and timm reads whole files: '
            'tools/publish.py makes one of it'
        )


def check_files(source: str) -> None:
    """As `check_file`, for each file of weights in a folder."""
    folder = Path(source)
    if not folder.is_dir():
        return check_file(source)
    files = sorted(path for path in folder.iterdir() if path.name.endswith(_OF_FOLDERS))
    if not files:
        raise ValueError(f'folder {source!r} has no weights ({", ".join(_OF_FOLDERS)})')
    names = [file.name for file in files]
    if set(OF_TIMM) & set(names):  # which timm takes, whatever parts of the same lie there
        files = [file for file in files if not _PART.search(file.name)]
    else:
        check_whole(str(files[0]))
        allowed = f'one, or one of the name {" or ".join(OF_TIMM)}'
        check(len(files) == 1, f'files of weights in {source!r}', shorten(names), allowed)
    for file in files:
        check_file(str(file))


def check_whole(path: str) -> None:
    """Refuse a part of weights: the rest would be as initialised."""
    if _PART.search(Path(path).name):
        raise ValueError(
            f'checkpoint {path!r} is one of several parts of weights (shards), which are not read: '
            'write them as one file, such as model.safetensors by save_file of safetensors.torch'
        )


def check_file(path: str) -> None:
    """Refuse a file that is not there, or whose checksums do not match; torch ignores them."""
    if not Path(path).is_file():
        raise ValueError(f'checkpoint {path!r} does not exist')
    check_whole(path)
    try:
        with open(path, 'rb') as file:
            start = file.read(32)
        if not start.startswith(_ZIP):
            if _OF_OLD in start:
                _logger.warning(_NO_CHECKSUMS, path)
            _check_digest(Path(path))
            return
        with zipfile.ZipFile(path) as archive:
            # torch reads nothing of what is marked as a folder
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & 0x10]
            spoilt = archive.testzip() or next(iter(folders), None)
    except Exception as error:  # a flipped bit can make it fail in any way
        raise ValueError(f'checkpoint {path!r} is damaged: {error}') from error
    if spoilt is not None:
        raise ValueError(f'checkpoint {path!r} is damaged: {spoilt} does not match its checksum')


def _check_digest(path: Path) -> None:
    """Compares a file with what the folder that it was published in says of it, if it does."""
    config = path.with_name(CONFIG)
    if path.name != OF_TIMM[0] or not config.is_file():
        return
    try:
        described = json.loads(config.read_bytes())
    except ValueError as error:
        raise ValueError(f'{str(config)!r} beside it cannot be read: {error}') from error
    stated = described.get(DIGEST) if isinstance(described, dict) else None
    if stated is not None and stated != digest_of(path):
        raise ValueError(f'it does not match {DIGEST} in {str(config)!r}')


def digest_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
