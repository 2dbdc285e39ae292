"""Where a number comes from: the commit, the versions and the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

# Variables that let a processor compute with other kernels than it would by itself, so that sums
# round otherwise and take another time: docs/archive/one-run-on-two-processors.md. What is
# preloaded may be something else, such as an allocator, which nobody can tell by its name.
_CHOOSE_KERNELS = (
    'ATEN_CPU_CAPABILITY',
    'DNNL_MAX_CPU_ISA',
    'LD_PRELOAD',
    'MKL_CBWR',
    'MKL_ENABLE_INSTRUCTIONS',
    'ONEDNN_DEFAULT_FPMATH_MODE',
    'ONEDNN_MAX_CPU_ISA',
)

_CPUINFO = Path('/proc/cpuinfo')


def commit() -> str | None:
    """Commit of the checkout that runs, '+' if files differ; None outside git."""
    here = Path(__file__).resolve().parent
    rows = here.parent / 'docs' / 'results'
    # whatever a user has set for `git diff`
    plain = ('--quiet', '--no-relative', '--no-ext-diff', '--ignore-submodules=untracked')
    where = (':(top)', f':(exclude){rows}')
    try:
        name = _git(here, 'describe', '--always', '--abbrev=12', '--exclude=*')
        same = _git(here, '--no-literal-pathspecs', 'diff', *plain, 'HEAD', '--', *where)
    except OSError:  # there is no git
        return None
    if name.returncode:
        return None
    return name.stdout.strip() + ('+' if same.returncode else '')


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(['git', *arguments], cwd=folder, capture_output=True, text=True)


def processor() -> str:
    """Name of the processor, and what is set that chooses its kernels; files without folders."""
    # what Linux says of the first one
    first = _CPUINFO.read_text().partition('\n\n')[0] if _CPUINFO.exists() else ''
    cpu = dict(re.findall(r'^(.*?)\s*:[^\S\n]*(.*?)\s*$', first, re.MULTILINE))
    name = cpu.get('model name') or platform.processor() or platform.machine()
    if 'cpu family' in cpu:
        name += f' (family {cpu["cpu family"]}, model {cpu["model"]})'
    given = {v: os.environ[v] for v in _CHOOSE_KERNELS if os.environ.get(v)}
    if 'LD_PRELOAD' in given:  # what is private, and no other machine where it lies elsewhere
        given['LD_PRELOAD'] = ':'.join(
            Path(file).name for file in re.findall('[^ :]+', given['LD_PRELOAD'])
        )
    return ', '.join([name, *(f'{v}={value}' for v, value in given.items())])


def installed(package: str) -> str | None:
    """Version of an installed package, None if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
