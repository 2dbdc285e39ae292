"""Where a number comes from: the commit, the versions and the machine."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path


def commit() -> str | None:
    """Commit of the checkout that runs, '+' if files differ; None outside git.

    Files of `docs/results` are not asked: a queue writes rows there, and no training reads them.
    """
    name = _git('describe', '--always', '--abbrev=12', '--exclude=*')
    if name is None or name.returncode:
        return None
    rows = Path(__file__).resolve().parents[1] / 'docs' / 'results'
    # whatever a user has set for `git diff`
    plain = ('--quiet', '--no-relative', '--no-ext-diff', '--ignore-submodules=untracked')
    where = (':(top)', f':(exclude){rows}')
    same = _git('--no-literal-pathspecs', 'diff', *plain, 'HEAD', '--', *where)
    return name.stdout.strip() + ('' if same is not None and same.returncode == 0 else '+')


def _git(*arguments: str) -> subprocess.CompletedProcess[str] | None:
    """What git says of the checkout that runs; None where there is no git."""
    command, here = ['git', *arguments], Path(__file__).resolve().parent
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True)
    except OSError:
        return None


def processor() -> str:
    """Name of the processor."""
    cpu = Path('/proc/cpuinfo')
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    models = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return models[0] if models else platform.processor() or platform.machine()


def installed(package: str) -> str | None:
    """Version of an installed package, None if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
