"""Applies each fault on a copy of the repository and runs its tests: which of them find it.

    python tests/golden/faults/run.py [--only NAME] [--room ROOM] [--jobs 2]

Exits with 1 if a fault cannot be applied, its tests cannot be run, or over a tenth is not found.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copy2
from time import monotonic

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from tests.golden.faults.table import FAULTS, Fault  # noqa: E402  a program, not a module

SECONDS = 180
COMMAND = [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', '-n0']


def copy_repository(folder: Path) -> None:
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split('\0')):
        if (ROOT / name).is_file():  # and not removed since the last commit
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy2(ROOT / name, folder / name)


def run_tests(tests: Sequence[str], folder: Path, seconds: float) -> tuple[int | None, str]:
    """Exit status of pytest, None after as many seconds, and what it said."""
    environment = {
        'OMP_WAIT_POLICY': 'PASSIVE',
        **os.environ,
        'PYTHONPATH': str(folder),  # before the clone that is installed
        'OMP_NUM_THREADS': '1',
    }
    with subprocess.Popen(
        [*COMMAND, *tests],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # what tests have started ends with them
    ) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]


def examine(fault: Fault) -> tuple[str, bool | None]:
    """What to say of a fault, and whether it is as it should be; None if nobody knows."""
    with tempfile.TemporaryDirectory(prefix='fault-') as name:
        folder = Path(name)
        copy_repository(folder)
        path = folder / fault.file
        text = path.read_text() if path.is_file() else ''
        if text.count(fault.old) != 1:
            return f'moved or gone: {fault.file}', None
        tests, began = [f'tests/{test}' for test in fault.tests.split()], monotonic()
        while True:
            path.write_text(text.replace(fault.old, fault.new))
            status, said = run_tests(tests, folder, SECONDS - (monotonic() - began))
            took = f'{monotonic() - began:.0f} s'
            if status is None:
                return f'NOT CAUGHT in {SECONDS} s', False
            if status == 0:
                return f'NOT CAUGHT, {took}', False
            found = re.search(r'^(?:FAILED|ERROR) (.+?)(?: - |$)', said, re.MULTILINE)
            if found is None:
                return f'tests do not run, {took}:\n{said[-2000:]}', None
            path.write_text(text)
            if run_tests([found[1]], folder, SECONDS)[0] == 0:
                return f'caught by {found[1]}, {took}', True
            tests += ['--deselect', found[1]]  # fails in any case, and says nothing of the fault


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--only', choices=[fault.name for fault in FAULTS], metavar='NAME')
    parser.add_argument('--room', choices=sorted({fault.room for fault in FAULTS}))
    parser.add_argument('--jobs', type=int, default=2, help='faults at a time')
    given = parser.parse_args()
    chosen = [f for f in FAULTS if given.only in (None, f.name) and given.room in (None, f.room)]
    good = unknown = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        answers = pool.map(examine, chosen)
        for fault, (said, is_good) in zip(chosen, answers, strict=True):
            print(f'{fault.room:15}{fault.name:34}{said}', flush=True)
            good += bool(is_good)
            unknown += is_good is None
    print(f'{good} of {len(chosen)} caught')
    return int(unknown > 0 or 10 * (len(chosen) - good) > len(chosen))


if __name__ == '__main__':
    sys.exit(main())
