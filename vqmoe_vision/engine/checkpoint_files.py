"""Files of checkpoints: written whole or not at all, and found again whatever ended the run."""

import fcntl
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from math import inf, isfinite
from pathlib import Path
from typing import Any
from uuid import uuid4

from mmengine.fileio import LocalBackend, register_backend

from vqmoe_vision.moe.config import check

from .checkpoint import (
    RUN_FILE,
    check_content,
    delete_folder,
    owner_of,
    parts_of,
    read_content,
    run_of,
)

POINTER = 'last_checkpoint'
BEST = 'best_'
# In the message hub, the word of `identify`.
RUN = 'run_id'
# of every checkpoint that a run can go on from
_NEEDED = ('meta', 'state_dict', 'message_hub')


class SaveError(OSError):
    """A file could not be written; what was there before is as it was."""


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file, so that whatever happens meanwhile it is the old one or the new one."""
    partial = path.with_name(f'.{path.name}.part')
    try:
        partial.unlink(missing_ok=True)  # or a link would be followed
        with partial.open('xb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename: a name may reach the disk before its bytes
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):  # it is in nobody's way
            partial.unlink(missing_ok=True)
        raise SaveError(
            f'{path} could not be written ({error.strerror}); what was saved before is intact'
        ) from error
    # the file is there; some file systems cannot say when its name is on the disk too
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Brings the names of a folder's files to the disk, where its file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@register_backend('atomic')
class AtomicBackend(LocalBackend):
    """mmengine's files on this machine, written whole or not at all, and deleted later."""

    def __init__(self) -> None:
        self.outdated: list[str] = []

    def remove(self, filepath: str | Path) -> None:
        """Keeps the name: mmengine's hook deletes before it writes what takes the place."""
        self.outdated.append(Path(filepath).name)

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes a file."""
        write_atomically(Path(filepath), obj)


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint that a run wrote last."""
    return folder / Path((folder / POINTER).read_text().strip()).name


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keeps a work dir for one training, until that ends or is killed."""
    lock = folder / '.lock'
    allowed = f'a folder whose {lock.name} is no link, which would be followed'
    check(not lock.is_symlink(), '--work-dir', str(folder), allowed)
    with lock.open('a') as file:
        try:
            # one that ends with the process, and that no worker of its data loaders inherits
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f'--work-dir {folder} is in use by another training: wait for its end, or name '
                'another one'
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def identify(folder: Path, resumed: bool, stated: Any) -> str:
    """The word by which a run knows its files again, and nobody else's."""
    file = folder / RUN_FILE
    if not resumed:
        stated = file.read_text(errors='replace') if file.is_file() else None
    known = isinstance(stated, str) and re.fullmatch('[0-9a-f]{32}', stated)
    run = stated if known else uuid4().hex
    write_atomically(file, run.encode())
    return run


def remove_partial(folder: Path, run: str) -> None:
    """Removes what a run that was killed has written in part."""
    for name in ('*.pth', '*.py', POINTER, RUN_FILE):  # as `write_atomically` calls them
        for path in folder.glob(f'.{name}.part'):
            if path.is_file():
                path.unlink()
    for path in folder.glob('.*.sharded.part'):
        if owner_of(path.name[1:].removesuffix('.part')) and run_of(path) == run:
            delete_folder(path)
    remove_unnamed(folder, run)


def remove_unnamed(folder: Path, run: str) -> None:
    """Removes a run's folders of parts that no checkpoint beside them names."""
    made = (path for path in folder.glob('*.sharded') if run_of(path) == run)
    found = {path.name: path for path in made if owner_of(path.name)}
    for file in folder.iterdir() if found else ():
        # a checkpoint under whatever name: torch's are zip archives
        if not file.is_file() or (file.suffix != '.pth' and not zipfile.is_zipfile(file)):
            continue
        try:
            named, _ = parts_of(read_content(str(file), verify=False))
        except Exception:  # of another format, or damaged, and perhaps repaired: its folders stay
            if file.suffix != '.pth':  # it may be any under another name
                return
            found = {name: path for name, path in found.items() if owner_of(name) != file.name}
            continue
        found.pop(named, None)
    for path in found.values():
        delete_folder(path)


def delete(folder: Path, names: Iterable[str], run: str) -> None:
    """Deletes checkpoints of a run in its work dir, and nothing else whatever the names say."""
    for path in [folder / Path(name).name for name in names]:
        own = False
        if path.suffix == '.pth':
            with suppress(Exception):  # what is of others, or damaged, can fail in any way
                content = read_content(str(path), verify=False)
                own = content['message_hub']['runtime_info'][RUN] == run
        if own:
            path.unlink()
    remove_unnamed(folder, run)


def candidates(folder: Path) -> list[Path]:
    """Files of a work dir that a run may go on from; the best ones hold no optimizer."""
    return sorted(path for path in folder.glob('*.pth') if not path.name.startswith(BEST))


def newest_checkpoint(folder: Path, say: Callable[[str], None], after: float = -inf) -> Path:
    """The newest checkpoint of a run that reads completely, its checksums included."""
    # among the files: whatever ends a run may do so before the pointer is written
    found, passed_over = _by_age(folder)
    for reason in passed_over:
        say(f'passed over: {reason}')
    for _, path in sorted((one for one in found if one[0][0] > after), reverse=True):
        try:
            check_content(str(path))
            return path
        except ValueError as error:
            passed_over.append(str(error))
            say(f'passed over: {error}')
    reasons = f' that reads completely: {"; ".join(passed_over)}' if passed_over else ''
    raise FileNotFoundError(f'--resume finds no checkpoint in {str(folder)!r}{reasons}')


def newest_time(folder: Path) -> float:
    """When the newest checkpoint of a run was written, in seconds since 1970; 0 without one."""
    return max((saved_at for (saved_at, _), _ in _by_age(folder)[0]), default=0.0)


def newest_before(folder: Path) -> float | None:
    """When the newest checkpoint was written before torchrun has begun; None without a later one.

    Of processes that are started again: each attempt has the same torchrun for its parent.
    """
    torchrun, newest = str(os.getppid()), newest_time(folder)
    note = folder / '.before_restarts'
    known = note.read_text().split() if note.is_file() else []
    if int(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')) and known[1:] == [torchrun]:
        return before if (before := float(known[0])) < newest else None
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        write_atomically(note, f'{newest!r} {torchrun}'.encode())
    return None


def _by_age(folder: Path) -> tuple[list[tuple[tuple[float, int], Path]], list[str]]:
    """The checkpoints that say when they were written, and what is wrong with the others."""
    found, wrong = [], []
    for path in candidates(folder):
        try:
            content = read_content(str(path), verify=False)
        except ValueError as error:
            wrong.append(str(error))
            continue
        parts = content if isinstance(content, dict) else {}
        meta = parts['meta'] if all(isinstance(parts.get(name), dict) for name in _NEEDED) else {}
        if not all(type(meta.get(name)) is int for name in ('epoch', 'iter')):
            needed = f'{list(_NEEDED)}, the epoch and the iteration'
            wrong.append(f'{str(path)!r} is no checkpoint of a run, which has {needed}')
        else:  # its file knows better than the folder of a copy when it was written
            saved_at = meta.get('saved_at', path.stat().st_mtime)
            if not isinstance(saved_at, float) or not isfinite(saved_at):
                wrong.append(f'{str(path)!r} has saved_at={saved_at!r}, which is no time')
            else:
                found.append(((saved_at, meta['iter']), path))
    return found, wrong
