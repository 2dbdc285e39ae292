"""Runs of several processes, each forked from one that has imported everything.

A folder holds `runs.json`: by name, the tool, the variables and the arguments of each rank.
Each rank writes what it prints beside it, and `ended.json` says how it ended.
"""

import json
import os
import signal
import socket
import sys
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from vqmoe_vision.engine import cli

from ..quicker import quicken

# Seconds from SIGTERM to SIGKILL, of which torchrun has 30.
GRACE = 10.0


def rank(folder: Path, tool: str, variables: dict[str, str], arguments: list[str]) -> int:
    process = os.fork()
    if process:
        return process
    os.environ.update(variables)
    status = 1
    out, err = ((folder / name).open('w') for name in ('out', 'err'))
    with out, err, redirect_stdout(out), redirect_stderr(err):
        try:
            getattr(cli, tool)(arguments)
            status = 0
        except SystemExit as end:  # as the interpreter does
            if isinstance(end.code, str):
                print(end.code, file=err)
    os._exit(status)


def run(folder: Path, tool: str, ranks: list[dict]) -> list[int]:
    """Statuses of all ranks of a run; as torchrun does, ends all as soon as one has failed."""
    with socket.socket() as one:
        one.bind(('127.0.0.1', 0))
        where = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(one.getsockname()[1])}
    processes = []
    for number, one in enumerate(ranks):
        (folder / str(number)).mkdir(parents=True)
        variables = {**where, **one['variables']}
        processes.append(rank(folder / str(number), tool, variables, one['arguments']))
    ended: dict[int, int] = {}
    told: float | None = None
    while len(ended) < len(processes):
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            ended[process] = os.waitstatus_to_exitcode(status)
        if any(ended.values()):
            late = told is not None and time.monotonic() > told + GRACE
            for left in processes if told is None or late else ():
                if left not in ended:
                    os.kill(left, signal.SIGKILL if late else signal.SIGTERM)
            told = told or time.monotonic()
        time.sleep(0.1)
    return [ended[process] for process in processes]


def run_all(_rank: int, folder: Path) -> None:
    """In a process of `tests.forked`."""
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    quicken()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    runs = json.loads((folder / 'runs.json').read_text())
    ended = {name: run(folder / name, one['tool'], one['ranks']) for name, one in runs.items()}
    (folder / 'ended.json').write_text(json.dumps(ended))
