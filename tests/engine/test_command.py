"""A tool whose output is a pipe."""

import argparse
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessExitedException

from vqmoe_vision.engine import cli
from vqmoe_vision.engine.cli import run

from ..forked import spawn
from ..logs import reports
from ..rows import CONFIGS


def prints(length: int, _: argparse.Namespace) -> None:
    print('-' * length)


def tool(_rank: int, action: Callable[[argparse.Namespace], None], errors: Path) -> None:
    """What it prints goes where nobody reads any more."""
    parser = argparse.ArgumentParser()
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


DIGITS = str(CONFIGS / 'classification/digits/demo/vit_tiny_vqmoe_demo.py')
TINY = 'model.depth=2 model.embed_dim=12 model.patch_size=16 train_cfg.max_epochs=1 '
TINY += 'train_cfg.val_interval=1 train_dataloader.batch_size=600'


@pytest.mark.parametrize('choice', ['bar', 'plain', None])
def test_a_terminal_shows_a_bar_and_a_file_every_line(
    choice: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ['--cfg-options', *TINY.split(), f'experiment_name=terminal_{choice}']
    asked = [] if choice is None else ['--log', choice]  # what is no terminal is plain
    run = tmp_path / 'run'
    cli.train([DIGITS, '--work-dir', str(run), *asked, *options])
    shown = capsys.readouterr().out
    assert 'Training vit_tiny_vqmoe (' in shown and 'on digits (1257 images): 1 epochs' in shown
    assert ' 600 images: 1 processes x 600 ' in shown
    assert f'last {run}/epoch_1.pth' in shown and 'Trained, accuracy/top1 ' in shown
    bar = choice == 'bar'
    assert ('| 2/2 [' in shown and ', loss ' in shown) == bar
    assert 'Config:' not in shown  # which the file has
    assert ('Epoch(val) [1][1/1]' in shown) != bar
    (log,) = run.glob('*/*.log')
    assert 'Config:' in log.read_text()
    assert any('Epoch(val)' in line for line in reports(run))
    tested = ['--work-dir', str(run), *asked, *options[:-1], f'experiment_name=test_{choice}']
    cli.test([DIGITS, str(run / 'epoch_1.pth'), *tested])
    assert 'Tested  accuracy/top1 ' in capsys.readouterr().out
