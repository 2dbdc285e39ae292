"""What a step frees is there for the next one, and no page of it is mapped again."""

import os
import platform
import subprocess
import sys

import pytest

from vqmoe_vision.engine import host_memory

PAGE_FAULTS = """
import resource, runpy, sys
import numpy as np

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(size << 20, np.uint8) for size in (100, 10, 1)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# without the packages around it, whose import takes seconds
kept = runpy.run_path(sys.argv[2])['keep_freed_memory']() if sys.argv[1] == 'keep' else None
step()
print(kept, step())
"""


def faults(mode: str, **environment: str) -> tuple[str, int]:
    command = [sys.executable, '-c', PAGE_FAULTS, mode, host_memory.__file__]
    plain = {name: value for name, value in os.environ.items() if not name.startswith('MALLOC_')}
    ran = subprocess.run(
        command, check=True, capture_output=True, text=True, env=plain | environment
    )
    kept, count = ran.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='another allocator has no such call')
def test_a_second_step_maps_no_page_anew() -> None:
    # 111 MiB are 28,416 pages of 4 KiB, or 56 huge ones of 2 MiB
    _, as_it_is = faults('leave')
    kept, count = faults('keep')
    assert kept == 'True'
    assert as_it_is > 40 and count < as_it_is / 4


def test_what_a_user_has_set_is_left_alone() -> None:
    kept, _ = faults('keep', MALLOC_TRIM_THRESHOLD_='100000')
    assert kept == 'False'
