"""Memory that a training on a CPU frees stays with its process.

glibc gives large blocks back to the kernel when they are freed, and each step asks for the same
blocks again: the kernel then clears and maps every page anew. docs/performance.md says what that
costs.
"""

import ctypes
import os

# of glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_VARIABLES = ('MALLOC_TRIM_THRESHOLD_', 'MALLOC_MMAP_THRESHOLD_')
_LARGEST = 2**31 - 1
# the most that an older glibc takes
_FORMERLY = 32 << 20


def keep_freed_memory() -> bool:
    """Lets glibc keep what this process frees, for its own next blocks of up to 2 GiB."""
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if os.name == 'posix' else None
    if mallopt is None or any(name in os.environ for name in _VARIABLES):
        return False
    # this one first: the other alone would let each block of 128 kB be mapped anew
    kept = any(mallopt(_MMAP_THRESHOLD, size) for size in (_LARGEST, _FORMERLY))
    return bool(kept and mallopt(_TRIM_THRESHOLD, _LARGEST))
