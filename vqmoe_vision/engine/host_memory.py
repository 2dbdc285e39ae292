"""Memory that a training on a CPU frees stays with its process.

glibc gives large blocks back to the kernel when they are freed, and each step asks for the same
blocks again: the kernel then clears and maps every page anew. docs/performance.md says what that
costs.
"""

import ctypes
import os

# of glibc's malloc.h, and the variables by which a user sets the same
_PARAMETERS = {'MALLOC_TRIM_THRESHOLD_': -1, 'MALLOC_MMAP_THRESHOLD_': -3}
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets glibc keep what this process frees, for its own next blocks of up to 2 GiB.

    The most that a process holds at a time stays what it is. Processes that it forks, such as data
    workers, do the same. What a user has set by glibc's environment variables is left alone.

    Returns:
        Whether it does so: not without glibc, nor where a user has set something else.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if os.name == 'posix' else None
    if mallopt is None or any(name in os.environ for name in _PARAMETERS):
        return False
    return all([mallopt(number, _LARGEST) for number in _PARAMETERS.values()])
