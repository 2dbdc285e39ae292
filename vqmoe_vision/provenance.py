"""Where a number comes from: the commit, the versions and the machine."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path


def commit() -> str | None:
    """Commit of the checkout that runs, '+' if files differ; None outside git."""
    command = ['git', 'describe', '--always', '--abbrev=12', '--dirty=+', '--exclude=*']
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


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
