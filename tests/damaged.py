"""Files with some bytes changed, or cut off."""

from collections.abc import Sequence

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
