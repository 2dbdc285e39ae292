"""EMAHook beside codebooks: what is copied, what is averaged, and that a resume stays exact."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.cli import train

from .test_cli import TINY

AVERAGES = ['default_hooks.ema.type=EMAHook', 'default_hooks.ema.momentum=0.001']
CODES = 'model.blocks.1.mlp.quantizer.codebook.'


def run(folder: Path, *options: str, more: tuple[str, ...] = ()) -> Path:
    path = folder.parent / 'tiny.py'
    path.write_text(TINY.replace('NAME', repr(f'{folder.parent.name} {folder.name}')))
    train([str(path), '--work-dir', str(folder), *more, '--cfg-options', *AVERAGES, *options])
    return folder


def saved(folder: Path, epoch: int = 2) -> dict[str, Any]:
    return read_content(str(folder / f'epoch_{epoch}.pth'))


def codebook(content: dict[str, Any], of: str, prefix: str = '') -> dict[str, Tensor]:
    start = prefix + CODES
    return {n.removeprefix(start): v for n, v in content[of].items() if n.startswith(start)}


def test_the_saved_codebook_is_that_of_the_last_update(tmp_path: Path) -> None:
    content = saved(run(tmp_path / 'run'))
    averaged = codebook(content, 'state_dict')
    trained = codebook(content, 'ema_state_dict', 'module.')
    assert averaged['updates'] == content['meta']['iter'] and 'embed' in averaged
    torch.testing.assert_close(averaged, trained, rtol=0, atol=0)


def test_codes_that_are_weights_are_averaged_from_their_start_on(tmp_path: Path) -> None:
    content = saved(run(tmp_path / 'run', 'model.moe.codebook=cvq'))
    averaged = codebook(content, 'state_dict')['embed']
    trained = codebook(content, 'ema_state_dict', 'module.')['embed']
    assert not torch.equal(averaged, trained)
    # the random codes before k-means are no longer than a tenth of a token
    assert (averaged - trained).norm() < 0.3 * trained.norm()


@pytest.mark.parametrize('book', ['ema', 'cvq'])
def test_a_run_with_averages_resumes_exactly(book: str, tmp_path: Path) -> None:
    option = f'model.moe.codebook={book}'
    whole, resumed = run(tmp_path / 'whole', option), tmp_path / 'resumed'
    resumed.mkdir()
    shutil.copy(whole / 'epoch_1.pth', resumed)
    run(resumed, option, more=('--resume',))
    for part in ('state_dict', 'ema_state_dict'):
        torch.testing.assert_close(saved(resumed)[part], saved(whole)[part], rtol=0, atol=0)
