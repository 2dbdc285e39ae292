"""A tool whose output is a pipe."""

import os
import signal
import subprocess
import sys

import pytest

TOOL = """
import argparse
from vqmoe_vision.engine.command import run

def action(args):
    ACTION

parser = argparse.ArgumentParser()
parser.add_argument('--debug', action='store_true')
run(parser, [], action)
"""


def start(action: str, stdout: int) -> tuple[int, str]:
    """The status and the errors of a tool."""
    command = [sys.executable, '-c', TOOL.replace('ACTION', action)]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize('length', [1, 100_000], ids=['as_it_ends', 'as_it_prints'])
def test_a_tool_whose_output_is_read_no_more_ends_as_others_do(length: int) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        assert start(f'print("-" * {length})', write) == (-signal.SIGPIPE, '')
    finally:
        os.close(write)


def test_another_broken_pipe_is_an_error() -> None:
    status, said = start('raise BrokenPipeError(32, "Broken pipe")', subprocess.PIPE)
    assert status == 1
    assert said == 'error: BrokenPipeError: [Errno 32] Broken pipe\n'
