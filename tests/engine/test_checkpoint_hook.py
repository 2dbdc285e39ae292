"""Saves of a training: what lies in the work dir at each moment, and what a checkpoint may name."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.registry import HOOKS
from mmengine.runner import Runner, find_latest_checkpoint

from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.checkpoint_files import RUN, newest_checkpoint
from vqmoe_vision.engine.checkpoint_hook import AtomicCheckpointHook
from vqmoe_vision.engine.cli import load_config

from .. import cases
from ..runs import train
from .tiny import write_config


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('two_epochs')
    return train(write_config(folder), folder / 'work')


def names(work: Path) -> list[str]:
    return sorted(p.name for p in work.iterdir() if p.suffix in ('.pth', '.part'))


def test_files_name_each_other_without_folders(trained):
    best, last = names(trained)
    assert last == 'epoch_2.pth' and best.startswith('best_accuracy_top1_epoch_')
    assert (trained / 'last_checkpoint').read_text() == last
    info = read_content(str(trained / last))['message_hub']['runtime_info']
    assert (info['last_ckpt'], info['best_ckpt']) == (last, best)
    assert info['keep_ckpt_ids'] == [2] and info[RUN] == (trained / '.run_id').read_text()
    # as it stands, which the hook finds in the work dir
    assert find_latest_checkpoint(str(trained)) == last


def resumed(config: str, work: Path, epochs: int = 3) -> Runner:
    """As mmseg's own tools/train.py --resume, which knows nothing of this package's hook."""
    settings = load_config(config, {'train_cfg.max_epochs': epochs})
    settings.work_dir, settings.resume = str(work), True
    settings.experiment_name = str(work)  # mmengine keeps one logger per name in a process
    runner = Runner.from_cfg(settings)
    runner.train()
    return runner


def test_a_copied_work_dir_leaves_the_original_alone(trained, tmp_path, monkeypatch):
    work = shutil.copytree(trained, tmp_path / 'copy')
    before = {path: path.read_bytes() for path in trained.glob('*.pth')}
    monkeypatch.chdir(tmp_path)  # from any folder
    runner = resumed(write_config(tmp_path), work)
    assert runner.epoch == 3
    assert {path: path.read_bytes() for path in trained.glob('*.pth')} == before
    assert 'epoch_3.pth' in names(work) and len(names(work)) == 2


def crafted(trained: Path, work: Path, later: int = 60, **info: Any) -> None:
    work.mkdir()
    content = torch.load(trained / 'epoch_2.pth', weights_only=True)
    info['validated_iter'] = content['meta']['iter']  # whether or not its score was the best
    content['message_hub']['runtime_info'] |= info
    content['message_hub']['resumed_keys'] |= dict.fromkeys(info, True)
    content['meta']['saved_at'] += later  # newer than what lies beside it
    torch.save(content, work / 'epoch_2.pth')


@pytest.mark.parametrize('run', [32 * 'a', None, 7])
def test_no_checkpoint_deletes_a_file_of_another_run(run, trained, tmp_path):
    work = tmp_path / 'work'
    theirs = ['best_thesis.pth', 'epoch_1.pth', 'epoch_0.pth', 'thesis.pth']
    outdated = ['thesis.pth', 'best_thesis.pth', 5000 * 'n' + '.pth', 'other.pth']
    info = dict(best_ckpt='best_thesis.pth', best_score=-1.0, keep_ckpt_ids=[0, 1, 2])
    crafted(trained, work, outdated_ckpts=outdated, **info, **{RUN: run})
    for name in theirs:  # of the run that was here, of which the checkpoint is not
        shutil.copy(trained / 'epoch_2.pth', work / name)
    shutil.copy(trained / '.run_id', work)
    torch.save({'message_hub': torch.ones(2)}, work / 'other.pth')
    (work / '.thesis.part').touch()
    part = work / 'thesis.1.sharded/shard-00001-model-00001-of-00001.safetensors'
    part.parent.mkdir()
    part.touch()
    resumed(write_config(tmp_path), work)
    assert {*theirs, 'other.pth', '.thesis.part'} < {*names(work)}
    assert (work / 'epoch_2.pth').exists() == (run != 32 * 'a')
    assert part.is_file()


def test_no_checkpoint_deletes_a_file_outside_the_work_dir(trained, tmp_path):
    thesis, folder = tmp_path / 'best_thesis.pth', tmp_path / 'epoch_..'
    thesis.touch()
    best = dict(best_ckpt=str(thesis), best_score=-1.0)
    kept = ['../epoch_..', f'/../{thesis.name}', 0, 1, 2]
    outdated = [str(thesis), '../best_thesis.pth', str(folder)]
    folder.mkdir()
    crafted(trained, tmp_path / 'work', **best, keep_ckpt_ids=kept, outdated_ckpts=outdated)
    resumed(write_config(tmp_path), tmp_path / 'work')
    assert thesis.is_file() and folder.is_dir()
    assert len(names(tmp_path / 'work')) == 2


@cases('last, outdated', (7, 2), ('epoch_1.pth', 2), ('epoch_2.pth', 1))
def test_at_the_end_goes_what_a_kill_has_left_and_not_the_last_checkpoint(
    last, outdated, trained, tmp_path
):
    work = tmp_path / 'work'
    crafted(trained, work, outdated_ckpts=[f'epoch_{outdated}.pth'], last_ckpt=last)
    if outdated == 1:  # killed before the newer one was named
        shutil.copy(trained / 'epoch_2.pth', work / 'epoch_1.pth')
        (work / 'last_checkpoint').write_text('epoch_1.pth')
    resumed(write_config(tmp_path), work, epochs=2)  # nothing is left to train
    assert names(work) == ['epoch_2.pth']
    if outdated == 1:
        assert (work / 'last_checkpoint').read_text() == 'epoch_2.pth'


@cases(
    'option, value',
    *(('filename_tmpl', n) for n in ('epoch_{x}.pth', 'epoch_{}_{}.pth', 'best_{}.pth', '../{}')),
    ('out_dir', 'x'),
    ('backend_args', {'backend': 'petrel'}),
    ('max_kep_ckpts', 3),  # on which the first save would fail,
)
def test_options_that_no_run_could_follow_are_refused(option, value):
    with pytest.raises(ValueError, match=rf'{option}='):
        HOOKS.build(dict(type='AtomicCheckpointHook', interval=1, **{option: value}))


def test_a_damaged_file_is_passed_over_and_partial_ones_go(trained, tmp_path, capsys):
    work = shutil.copytree(trained, tmp_path / 'work')
    (work / 'epoch_3.pth').write_bytes((work / 'epoch_2.pth').read_bytes()[:-5000])
    (work / '.epoch_3.pth.part').write_bytes(b'half')
    (work / 'last_checkpoint').write_text('')  # as mmengine leaves it when it is killed
    train(write_config(tmp_path), work, 'train_cfg.max_epochs=3', resume=True)
    assert "passed over: checkpoint '" in (said := capsys.readouterr().err)
    assert "epoch_3.pth' is damaged" in said
    assert len(names(work)) == 2 and read_content(str(work / 'epoch_3.pth'))['meta']['epoch'] == 3


def test_a_clock_that_was_set_back_does_not_mislead(trained, tmp_path):
    crafted(trained, work := tmp_path / 'work', later=86_400)
    options = ['train_cfg.max_epochs=4', 'default_hooks.checkpoint.max_keep_ckpts=3']
    train(write_config(tmp_path), work, *options, resume=True)
    assert newest_checkpoint(work, print).name == 'epoch_4.pth'
    saved = (read_content(str(work / f'epoch_{epoch}.pth'))['meta'] for epoch in (2, 3, 4))
    times = [meta['saved_at'] for meta in saved]
    assert times[0] > time.time() + 80_000 and times == sorted(set(times))


def test_a_validation_that_was_cut_off_is_made_up_for(trained, tmp_path):
    # a kill in the validation of the last epoch leaves its checkpoint as it was before
    content = torch.load(trained / 'epoch_2.pth', weights_only=True)
    info = content['message_hub']['runtime_info']
    best = info['best_score']
    info['best_score'], info['validated_iter'] = 0.0, 1
    info.pop('best_ckpt')
    (work := tmp_path / 'work').mkdir()
    torch.save(content, work / 'epoch_2.pth')
    resumed(write_config(tmp_path), work, epochs=2)
    info = read_content(str(work / 'epoch_2.pth'))['message_hub']['runtime_info']
    assert info['best_ckpt'] == 'best_accuracy_top1_epoch_2.pth' == names(work)[0]
    assert 0 < info['best_score'] <= best


def test_a_new_best_deletes_no_checkpoint_that_a_run_goes_on_from(tmp_path):
    hook = AtomicCheckpointHook(interval=3, save_best='mIoU')
    hook.out_dir = str(tmp_path)
    hook._run = 'a run'
    for name in ('iter_5.pth', 'best_mIoU_epoch_1.pth', 'epoch_3.pth'):
        torch.save({'message_hub': {'runtime_info': {RUN: hook._run}}}, tmp_path / name)
    # a signal has saved iteration 5, between two checkpoints that are due
    hook._outdated = ['iter_5.pth', 'best_mIoU_epoch_1.pth']
    runner: Any = SimpleNamespace(message_hub=SimpleNamespace(runtime_info={}))
    hook._delete_outdated(runner)
    assert {path.name for path in tmp_path.iterdir()} == {'iter_5.pth', 'epoch_3.pth'}
    hook._delete_outdated(runner, 'epoch_3.pth')
    assert {path.name for path in tmp_path.iterdir()} == {'epoch_3.pth'}
