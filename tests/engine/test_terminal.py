"""What a terminal shows of a run, and what its log file has all the same."""

from pathlib import Path

import pytest

from vqmoe_vision.engine import cli

from ..logs import reports
from ..rows import CONFIGS

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
    assert f'last {run}/epoch_1.pth' in shown
    drawn = [line for line in shown.split('\r') if '█' in line]
    if choice == 'bar':
        assert ' 2/2  loss ' in ''.join(drawn) and 'accuracy/top1 ' in shown
        assert '0:00:0' in drawn[0] and 'INFO' not in shown
    else:
        assert not drawn and 'Epoch(val) [1][1/1]' in shown
    assert 'Config:' not in shown  # which the file has
    (log,) = run.glob('*/*.log')
    assert 'Config:' in log.read_text()
    assert any('Epoch(val)' in line for line in reports(run))
    tested = ['--work-dir', str(run), *asked, *options[:-1], f'experiment_name=test_{choice}']
    cli.test([DIGITS, str(run / 'epoch_1.pth'), *tested])
    assert 'Tested  accuracy/top1 ' in capsys.readouterr().out
