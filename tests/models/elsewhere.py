"""A saved program in a process of its own, which has imported torch alone."""

import subprocess
import sys
from pathlib import Path

import torch

NUMBERS = 3 * 3 * 16 * 16
IMAGES = torch.arange(float(NUMBERS)).view(3, 3, 16, 16).sin()


def run_elsewhere(file: Path, *statements: str) -> list[str]:
    """What statements print; they know `program`, `images`, which are `IMAGES`, and `extra`."""
    code = (
        'import sys, torch',
        'extra = {"about.json": ""}',
        f'program = torch.export.load({str(file)!r}, extra_files=extra)',
        f'images = torch.arange({NUMBERS}.).view(3, 3, 16, 16).sin()',
        *statements,
    )
    command = [sys.executable, '-W', 'ignore', '-c', '\n'.join(code)]
    return subprocess.check_output(command, text=True).splitlines()
