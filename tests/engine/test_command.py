"""A tool whose output is a pipe."""

import argparse
import io
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessExitedException

from vqmoe_vision.engine.command import run

from ..forked import spawn


def prints(length: int, _: argparse.Namespace) -> None:
    print('-' * length)


def loses_another_pipe(_: argparse.Namespace) -> None:
    raise BrokenPipeError(32, 'Broken pipe')


def tool(_rank: int, action: Callable[[argparse.Namespace], None], errors: Path) -> None:
    """What it prints goes where nobody reads any more."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--debug', action='store_true')
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    run(parser, [], action)


@pytest.mark.parametrize('length', [1, 100_000], ids=['as_it_ends', 'as_it_prints'])
def test_a_tool_whose_output_is_read_no_more_ends_as_others_do(length: int, tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException) as ended:
        spawn(tool, (partial(prints, length), tmp_path / 'errors'), 1)
    assert ended.value.exit_code == -signal.SIGPIPE
    assert (tmp_path / 'errors').read_text() == ''


def test_a_tool_without_an_output_does_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('sys.stdout', None)  # as the interpreter has it after a shell's >&-
    done: list[argparse.Namespace] = []
    run(argparse.ArgumentParser(), [], done.append)
    assert len(done) == 1


@pytest.mark.usefixtures('capfd')  # whose output is a file, as a shell's may be
@pytest.mark.parametrize('output', ['file', None, io.StringIO()], ids=['file', 'none', 'text'])
def test_another_broken_pipe_is_an_error(output: object, monkeypatch: pytest.MonkeyPatch) -> None:
    if output != 'file':
        monkeypatch.setattr('sys.stdout', output)
    with pytest.raises(SystemExit) as ended:
        run(argparse.ArgumentParser(), [], loses_another_pipe)
    assert ended.value.code == 'error: BrokenPipeError: [Errno 32] Broken pipe'
