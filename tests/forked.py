"""Processes of a test, forked from one that has imported everything.

Imports cost a process of its own four to eight processor seconds, the tests' tiny trainings less.
The standard library's fork server pays for them once. Tests that are about the start of a program,
or about what its imports print, run `python` itself.
"""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from runpy import run_module, run_path

import torch.multiprocessing as mp

from .quicker import quicken

ROOT = Path(__file__).parents[1]
METHOD = 'forkserver'

_CONTEXT = multiprocessing.get_context(METHOD)
_TASKS = 'vqmoe_vision.classification vqmoe_vision.segmentation vqmoe_vision.engine.cli'
# what mmengine and data sets import when a training begins: as long as a tiny one takes
_LATER = 'matplotlib.pyplot setuptools sklearn.model_selection torch.utils.tensorboard'
_CONTEXT.set_forkserver_preload(['pytest', 'hypothesis', *_TASKS.split(), *_LATER.split()])


def spawn(function: Callable[..., None], args: tuple, nprocs: int) -> None:
    """As `torch.multiprocessing.spawn`, with the variables of the first process that was forked."""
    mp.start_processes(function, args, nprocs, start_method=METHOD)


def run_tool(
    tool: str,
    *arguments: str,
    folder: Path,
    file_size: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Runs a program of `tools/`, or a module, as a shell would, in a folder.

    It may write `file_size` bytes into a file at most, and have variables beside those of this
    process.
    """
    with tempfile.TemporaryDirectory() as place:
        files = [str(Path(place) / name) for name in ('out', 'err')]
        environment = {**os.environ, **(variables or {})}
        options = (tool, arguments, folder, files, environment, file_size)
        process = _CONTEXT.Process(target=_run, args=options)
        process.start()
        process.join()
        out, err = (Path(file).read_text() for file in files)
    assert process.exitcode is not None
    return subprocess.CompletedProcess([tool, *arguments], process.exitcode, out, err)


def _run(tool, arguments, folder, files, environment, file_size) -> None:
    if file_size is not None:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, most))
    # a shell that runs the tests in the background has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    script, is_file = str(ROOT / 'tools' / tool), tool.endswith('.py')
    sys.path.insert(0, str(ROOT))
    sys.argv = [script, *arguments]
    sys.orig_argv = [sys.executable, *sys.argv]
    quicken()
    run_path(script, run_name='__main__') if is_file else run_module(tool, run_name='__main__')
