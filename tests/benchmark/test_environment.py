"""A run restarts itself once, with its allocator and threads set up."""

import os
import subprocess
import sys
from pathlib import Path

from benchmark.environment import MALLOC

TOOLS = Path(__file__).parents[2] / 'tools'
PROGRAM = """
import os
from benchmark.environment import MALLOC, restart_prepared
restart_prepared(3)
print(os.environ['OMP_NUM_THREADS'], *(os.environ.get(name) for name in MALLOC))
"""


def test_restarts_once_with_the_environment_it_needs() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in MALLOC}
    environment['OMP_NUM_THREADS'] = '1'
    environment['PYTHONPATH'] = os.pathsep.join(sys.path)
    command = [sys.executable, '-c', PROGRAM]
    lines = subprocess.check_output(command, text=True, env=environment).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith('restarting with OMP_NUM_THREADS=3')
    assert lines[1].startswith('3 ')
    if 'MALLOC_TOP_PAD_' in lines[0]:  # glibc
        assert lines[1] == ' '.join(['3', *MALLOC.values()])


def test_the_program_finds_its_package_beside_it(tmp_path: Path) -> None:
    """Both are called benchmark, and only the folder of the program is on the path."""
    command = [sys.executable, TOOLS / 'benchmark.py', 'moe', '-h']
    assert '--contenders' in subprocess.check_output(command, text=True, cwd=tmp_path)
