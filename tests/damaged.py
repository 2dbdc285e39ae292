"""Files with some bytes changed, or cut off, and what runs code when a file is read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


def damaged(files: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """What may become of one of several files; some stay sound."""
    change = st.tuples(st.integers(0, 2**16), st.integers(0, 255))

    def build(sound: bytes, changes: list[tuple[int, int]], cut: int) -> bytes:
        content = bytearray(sound)
        for place, value in changes:
            content[place % len(content)] = value
        return bytes(content[: cut or None])

    changes = st.lists(change, max_size=8)
    return st.builds(build, st.sampled_from(files), changes, st.integers(0, 2**12))


def flip(path: Path, place: int) -> None:
    """Changes one bit."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


class Call:
    """Is called by who unpickles it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call
