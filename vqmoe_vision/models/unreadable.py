"""What a file is that could not be read as weights, as far as its bytes say it."""

from __future__ import annotations

from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint

from .run_files import logs_passed_over
from .state_dicts import shorten

# How the archives begin that torch writes.
ZIP = b'PK\x03\x04'
_POINTER = b'version https://git-lfs'
_PAGES = (b'<!doctype', b'<html')


def found_in(path: str) -> str:
    """What is wrong with a file, and what to do; empty if its bytes do not tell."""
    file = Path(path)
    if not file.is_file():
        return ''
    with file.open('rb') as stream:
        start = stream.read(64)
    named_safe = path.endswith('.safetensors')
    if not start:
        return 'is empty (0 bytes): it was not written to its end, or not downloaded'
    if start.startswith(_POINTER):
        return 'is a pointer of Git LFS to its weights: git lfs pull downloads them'
    if start.lstrip().lower().startswith(_PAGES):
        return 'is a page of the web (HTML) and has no weights: download the file itself'
    if named_safe and start.startswith(ZIP):
        return 'is a file of torch.save by another name: let it end in .pth'
    if not named_safe and start[8:9] == b'{' and int.from_bytes(start[:8], 'little') < 1 << 30:
        return 'is a file of safetensors by another name: let it end in .safetensors'
    code = _code_in(path) if start.startswith(ZIP) else []
    if code:
        return (
            f'holds more than weights ({shorten(code)}) and is not loaded, which could run code: '
            'where it is trusted, load it, and save its state_dict() alone by torch.save'
        )
    return ''


def _code_in(path: str) -> list[str]:
    try:
        with logs_passed_over():
            return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # what is damaged, or no file of torch, can fail in any way
        return []
