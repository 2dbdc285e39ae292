"""Files of checkpoints under all that can happen to them."""

import os
import resource
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from vqmoe_vision.engine import checkpoint_files as files
from vqmoe_vision.engine.cli import train

from ..damaged import flip
from ..forked import METHOD, ROOT, spawn

OWN = 'a run'


def write(path: Path, iteration: int, saved_at: float, size: int = 1000) -> None:
    meta = {'epoch': 0, 'iter': iteration, 'saved_at': saved_at}
    hub = {'runtime_info': {files.RUN: OWN}}
    content = {'meta': meta, 'state_dict': {'w': torch.ones(size)}, 'message_hub': hub}
    torch.save(content, path)


def write_limited(_rank: int, path: Path, killed: bool) -> None:
    """1,000 of 3,000 bytes; with the default signal the kernel kills in the middle of the write."""
    if killed:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        files.write_atomically(path, b'new' * 1000)
    finally:  # the error is told by a file
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_bytes_reach_the_disk_before_their_name_does(tmp_path, monkeypatch):
    """No kill can show this, only a machine without power: the calls themselves are watched."""
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        target = os.readlink(f'/proc/self/fd/{descriptor}')
        size = os.fstat(descriptor).st_size if os.path.isfile(target) else ''
        steps.append(f'sync {Path(target).name} {size}'.strip())
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        steps.append('rename')
        replace(source, target)

    monkeypatch.setattr(os, 'fsync', watched_fsync)
    monkeypatch.setattr(os, 'replace', watched_replace)
    files.write_atomically(tmp_path / 'a.pth', b'12345')
    assert steps == ['sync .a.pth.part 5', 'rename', f'sync {tmp_path.name}']


@pytest.mark.parametrize('killed', [False, True])
def test_a_write_that_ends_in_the_middle_leaves_the_old_file(killed, tmp_path):
    path = tmp_path / 'a.pth'
    path.write_bytes(b'old')
    with pytest.raises((ProcessExitedException, ProcessRaisedException)) as ended:
        spawn(write_limited, (path, killed), nprocs=1)
    assert path.read_bytes() == b'old'
    if killed:
        assert getattr(ended.value, 'signal_name', None) == 'SIGXFSZ'
        partial = tmp_path / '.a.pth.part'
        assert partial.stat().st_size == 1000
        files.remove_partial(tmp_path, OWN)
    else:
        said = f'{path} could not be written (File too large); what was saved before is intact'
        assert str(ended.value).strip().endswith(f'SaveError: {said}')
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth']


def test_the_newest_file_that_reads_completely_is_found(tmp_path):
    # times of the files, as a copy leaves them, say the opposite of what is in them
    for age, iteration in enumerate((3, 4, 2)):
        write(tmp_path / f'iter_{iteration}.pth', iteration, 100.0 + iteration)
        os.utime(tmp_path / f'iter_{iteration}.pth', (age, age))
    write(tmp_path / 'best_mIoU_iter_9.pth', 9, 900.0)  # has no optimizer
    torch.save({'w': torch.ones(2)}, tmp_path / 'weights.pth')
    said: list[str] = []
    assert files.newest_checkpoint(tmp_path, said.append).name == 'iter_4.pth'
    (reason,) = said
    assert "weights.pth' is no checkpoint of a run" in reason
    flip(tmp_path / 'iter_4.pth', (tmp_path / 'iter_4.pth').stat().st_size // 2)
    (tmp_path / 'iter_3.pth').write_bytes(b'')
    said.clear()
    assert files.newest_checkpoint(tmp_path, said.append).name == 'iter_2.pth'
    assert any("iter_4.pth' is damaged" in line and 'checksum' in line for line in said)
    assert any("iter_3.pth' is damaged" in line for line in said)
    # a run that is started again does not go on from what was there before it
    with pytest.raises(FileNotFoundError, match=r"iter_4\.pth' is damaged"):
        files.newest_checkpoint(tmp_path, said.append, after=102.0)
    for path in files.candidates(tmp_path):
        path.write_bytes(b'')
    with pytest.raises(FileNotFoundError, match=r'finds no checkpoint in .* reads completely: '):
        files.newest_checkpoint(tmp_path, said.append)


def test_a_file_that_is_cut_off_anywhere_is_passed_over(tmp_path):
    for iteration in (1, 2):
        write(tmp_path / f'iter_{iteration}.pth', iteration, float(iteration), size=20_000)
    content = (tmp_path / 'iter_2.pth').read_bytes()
    # torch looks for the end of an archive in blocks of 4,096 bytes, in the last 64 KiB and more
    assert len(content) > 4096 + 2 * 32_768
    for length in [*range(0, len(content), 331), 4096, 4097, len(content) - 1]:
        (tmp_path / 'iter_2.pth').write_bytes(content[:length])
        assert files.newest_checkpoint(tmp_path, lambda _: None).name == 'iter_1.pth', length


def hold(folder: Path) -> None:
    with files.in_use(folder):
        (folder / 'held').touch()
        time.sleep(600)


def test_a_work_dir_is_for_one_training_at_a_time(tmp_path):
    process = get_context(METHOD).Process(target=hold, args=(tmp_path,))
    process.start()
    while not (tmp_path / 'held').exists():
        time.sleep(0.01)
    config = ROOT / 'configs/classification/digits/demo/vit_tiny_vqmoe_demo.py'
    with pytest.raises(SystemExit, match=r'^error: --work-dir \S+ is in use by another training'):
        train([str(config), '--work-dir', str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {'.lock', 'held'}  # nothing was touched
    process.kill()
    process.join()
    with files.in_use(tmp_path):  # what a kill has left is in nobody's way
        pass


def test_names_reach_nothing_outside_the_folder(tmp_path):
    work, other = tmp_path / 'work', tmp_path / 'thesis.pth'
    work.mkdir()
    for path in (other, work / 'notes.txt', work / 'iter_1.pth'):
        write(path, 1, 5.0)
    (work / 'folder.pth').mkdir()
    names = [str(other), '../thesis.pth', 'notes.txt', 'folder.pth', 'iter_1.pth', 'gone.pth']
    files.delete(work, names, OWN)
    assert other.is_file()
    assert sorted(path.name for path in work.iterdir()) == ['folder.pth', 'notes.txt']
    (work / 'last_checkpoint').write_text(str(other))
    assert files.last_checkpoint(work) == work / 'thesis.pth'


@pytest.mark.parametrize('saved_at', [float('nan'), float('inf'), 'now'])
def test_a_checkpoint_of_no_time_is_passed_over_by_its_name(tmp_path, saved_at):
    write(tmp_path / 'a.pth', 2, saved_at)
    lines: list[str] = []
    with pytest.raises(FileNotFoundError, match=r'a\.pth.* saved_at='):
        files.newest_checkpoint(tmp_path, lines.append)
    write(tmp_path / 'b.pth', 1, 5.0)
    assert files.newest_checkpoint(tmp_path, lines.append).name == 'b.pth'
    assert files.newest_time(tmp_path) == 5.0
    assert len(lines) == 2 and all('a.pth' in line and 'saved_at=' in line for line in lines)


def test_a_restart_knows_which_checkpoints_are_older(tmp_path, monkeypatch):
    known: list[float | None] = []

    def attempt(number: int, saved_at: float) -> None:
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', str(number))
        monkeypatch.setattr(files, 'newest_time', lambda _: saved_at)
        known.append(files.newest_before(tmp_path))

    attempt(0, 5.0)  # of a process that nobody starts again
    assert not [*tmp_path.iterdir()]
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    for number, saved_at in enumerate((5.0, 5.0, 7.0, 9.0)):
        attempt(number, saved_at)
    assert known == [None, None, None, 5.0, 5.0]  # what the first attempt has written is newer
    attempt(0, 9.0)  # the next run
    attempt(1, 9.0)
    # one whose first attempt ended before it came here
    monkeypatch.setattr(os, 'getppid', lambda: 1)
    attempt(1, 11.0)
    attempt(2, 12.0)
    assert known[5:] == [None, None, None, 11.0]
