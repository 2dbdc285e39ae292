"""Kills trainings at chosen moments, goes on with them, and compares with one left alone.

    python tests/soak/kills.py --kills 50 --seed 0 --out work_dirs/soak/kills.json

Each training is a process of its own, forked from one that has imported everything. Half of the
kills are aimed at saves: Python's audit events say when a file of a checkpoint or the pointer is
about to be created, renamed or deleted, and a limit on file sizes ends a process in the middle of
a write. The others come at a random moment.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from multiprocessing import Value
from pathlib import Path
from typing import Any

import torch
from kinds import KINDS, Kind, same
from mmengine.config import config as mmengine_config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from vqmoe_vision.engine.checkpoint import owner_of, read_content
from vqmoe_vision.engine.checkpoint_files import POINTER, candidates, last_checkpoint
from vqmoe_vision.engine.cli import train

# mmengine lays out the text of the config for every checkpoint, which is half of such a training
mmengine_config.FormatCode = lambda text, **_: (text, True)


class Shared:
    begun = Value('i', 0)
    reached = Value('i', 0)
    events = Value('i', 0)


@HOOKS.register_module()
class ReachedHook(Hook):
    def before_train(self, runner: Any) -> None:
        Shared.begun.value = runner.iter

    def after_train_iter(self, runner: Any, **_: Any) -> None:
        Shared.reached.value = runner.iter + 1


# of the files of checkpoints, of their folders of parts, and of what is in these
SUFFIXES = ('.pth', '.part', '.sharded', '.safetensors')
EVENTS = {'open': 'create', 'os.mkdir': 'create', 'os.rename': 'rename'}
EVENTS |= {'os.remove': 'delete', 'os.rmdir': 'delete'}


def watch_saves(folder: Path, step: Callable[[int, str], None]) -> None:
    """Calls a function before each step of a save in this process, with its number and name."""
    inside = str(folder)

    def audit(event: str, args: tuple) -> None:
        name = None
        if event == 'open' and str(args[0]) == inside:
            name = 'sync'
        elif event in EVENTS and str(args[0]).startswith(inside):
            file = Path(str(args[0]))
            of_a_save = file.suffix in SUFFIXES or file.name == POINTER
            if of_a_save and (event != 'open' or set('wx') & set(str(args[1]))):
                name = EVENTS[event]
                if POINTER in file.name:
                    name = f'{name} pointer'
                elif '.sharded' in str(file):
                    name = f'{name} part'
        if name is not None:
            Shared.events.value += 1
            step(Shared.events.value, name)

    sys.addaudithook(audit)


def dies_at(number: int, in_write_at: int | None, told: Path) -> Callable[[int, str], None]:
    """Ends the process at a step of a save, or in the write that follows the step."""

    def step(now: int, name: str) -> None:
        if now < number or (in_write_at is not None and 'create' not in name):
            return
        if in_write_at is None or 'pointer' in name:
            told.write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)
        told.write_text('write')
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (in_write_at, in_write_at))

    return step


def run(kind: Kind, folder: Path, prepare: Callable = lambda: None, kill_after: Any = None) -> int:
    resume = ['--resume'] if candidates(folder / 'work') else []
    Shared.reached.value = Shared.events.value = Shared.begun.value = 0
    process = os.fork()
    if process == 0:
        status = 1
        with (folder / 'output').open('a') as out, redirect_stdout(out), redirect_stderr(out):
            try:
                prepare()
                arguments = [str(folder / 'config.py'), '--work-dir', str(folder / 'work')]
                train([*arguments, *resume, *kind.arguments])
                status = 0
            except BaseException:
                traceback.print_exc(file=out)
        os._exit(status)
    iterations, seconds = kill_after or (sys.maxsize, 0.0)
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if Shared.reached.value >= iterations:
            time.sleep(seconds)
            os.kill(process, signal.SIGKILL)
        time.sleep(0.005)


def outcome(folder: Path) -> dict[str, Any]:
    work = folder / 'work'
    content = read_content(str(last_checkpoint(work)))
    keys = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')
    return {
        'files': sorted(path.name for path in (*work.glob('*.pth'), *work.glob('.*.part'))),
        'folders': sorted(str(owner_of(path.name)) for path in work.glob('*.sharded')),
        'best': [read_content(str(best))['state_dict'] for best in work.glob('best_*.pth')],
        **{key: content[key] for key in keys if key in content},
    }


def kill_and_go_on(
    kind: Kind, root: Path, whole: Any, draw: random.Random
) -> tuple[str, list[str]]:
    expected, names, iterations = whole
    folder = Path(tempfile.mkdtemp(dir=root))
    kind.write(folder)
    told = folder / 'told'
    if draw.random() < 0.6:
        in_write = draw.random() < 0.3
        steps = [n for n, name in enumerate(names, 1) if not in_write or name == 'create']
        in_write_at = draw.randrange(1, 40_000) if in_write else None
        step = dies_at(draw.choice(steps), in_write_at, told)
        work = folder / 'work'
        status = run(kind, folder, lambda: watch_saves(work, step))
    else:
        moment = draw.randrange(iterations), draw.uniform(0, 0.5)
        status = run(kind, folder, kill_after=moment)
    if status >= 0:
        faults = [] if status == 0 else [f'it ended with {status} before it was killed']
        where = ''
    else:
        reached, where = Shared.reached.value, told.read_text() if told.is_file() else 'random'
        status, faults = run(kind, folder), []
        if status != 0:
            faults.append(f'lost: {(folder / "output").read_text()[-500:]}')
        elif reached - Shared.begun.value > kind.interval:
            faults.append(f'{reached} iterations were done, it went on from {Shared.begun.value}')
    if not faults:
        found = outcome(folder)
        faults = [f'{k} differs' for k, v in expected.items() if not same(v, found.get(k))]
    shutil.rmtree(folder)
    return where, faults


def soak(kills: int, seed: int, out: Path | None) -> int:
    draw, counts = random.Random(seed), Counter[str]()
    faults: list[str] = []
    torch.set_num_threads(1)
    for package in ('classification', 'segmentation'):
        import_module(f'vqmoe_vision.{package}')
    with tempfile.TemporaryDirectory() as name:
        references = {}
        for title, kind in KINDS.items():
            folder = Path(tempfile.mkdtemp(dir=name))
            kind.write(folder)

            def prepare(folder: Path = folder) -> None:
                steps = (folder / 'steps').open('a', buffering=1)
                watch_saves(folder / 'work', lambda _, name: print(name, file=steps))

            if run(kind, folder, prepare) != 0:
                raise RuntimeError((folder / 'output').read_text()[-3000:])
            names = (folder / 'steps').read_text().splitlines()
            references[title] = outcome(folder), names, Shared.reached.value
        while sum(counts.values()) < kills:
            title = list(KINDS)[sum(counts.values()) % len(KINDS)]
            where, found = kill_and_go_on(KINDS[title], Path(name), references[title], draw)
            if where:
                counts[where] += 1
            faults += [f'{title}, killed at {where!r}: {fault}' for fault in found]
            print(f'{title}, killed at {where or "no moment"}: {found or "equal"}', flush=True)
    figures = {'seed': seed, 'kills': dict(counts), 'faults': faults}
    print(json.dumps(figures, indent=2))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=2) + '\n')
    return len(faults)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, help='JSON file for the figures')
    args = parser.parse_args()
    sys.exit(min(soak(args.kills, args.seed, args.out), 1))
