"""What the process of a run is started with; torch is not imported for it."""

import os
import platform
import sys

# Fresh weight gradients of 20 to 80 MB are otherwise mapped and faulted in anew at every step: that
# costs every contender 10 to 25 %, some more than others.
MALLOC = {
    'MALLOC_MMAP_THRESHOLD_': '4000000000',
    'MALLOC_TRIM_THRESHOLD_': '8000000000',
    'MALLOC_TOP_PAD_': '268435456',
}
_RESTARTED = 'VQMOE_BENCHMARK_RESTARTED'


def restart_prepared(threads: int) -> None:
    """Replace this process by itself with glibc's allocator and OpenMP set up, once."""
    wanted = {name: str(threads) for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
    wanted['KINETO_LOG_LEVEL'] = '99'  # the profiler, which reads memory, says nothing of itself
    if platform.libc_ver()[0] == 'glibc':
        wanted.update(MALLOC)
    missing = {k: v for k, v in wanted.items() if os.environ.get(k) != v}
    if not missing or _RESTARTED in os.environ:
        return
    print('restarting with', ' '.join(f'{k}={v}' for k, v in missing.items()), flush=True)
    environment = {**os.environ, **missing, _RESTARTED: '1'}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
