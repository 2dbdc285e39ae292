"""Kills trainings at chosen moments, goes on with them, and compares with one left alone.

    python tests/soak/kills.py --kills 50 --seed 0 --out work_dirs/soak/kills.json
    python tests/soak/kills.py --ranks 2 --kills 10 --out work_dirs/soak/restarts.json

Each training is a process of its own, forked from one that has imported everything. Half of the
kills are aimed at saves: Python's audit events say when a file of a checkpoint or the pointer is
about to be created, renamed or deleted, and a limit on file sizes ends a process in the middle of
a write. The others come at a random moment.

With `--ranks` the agent of `torchrun --max-restarts=KILLS` starts the ranks, forked in the same
way. Each attempt but the last one is killed: a random rank after a random iteration, or a rank that
saves at a step of a save or in the middle of a write.
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
from dataclasses import replace
from importlib import import_module
from multiprocessing import Value
from pathlib import Path
from typing import Any

import torch
from kinds import KINDS, Kind, same
from mmengine.config import config as mmengine_config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from vqmoe_vision.engine.checkpoint import owner_of, read_content
from vqmoe_vision.engine.checkpoint_files import POINTER, candidates, last_checkpoint
from vqmoe_vision.engine.cli import train

# mmengine lays out the text of the config for every checkpoint, which is half of such a training
mmengine_config.FormatCode = lambda text, **_: (text, True)

STEPS = 6  # of the saves of an attempt, at one of which it may be killed
# in parts: of the first rank, and of another, which creates the folder and its file
STEPS_IN_PARTS = (16, 2)


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
        if event not in EVENTS:
            return
        name, file = None, Path(str(args[0]))
        of_a_save = file.suffix in SUFFIXES or file.name == POINTER
        creates = event != 'open' or set('wx') & set(str(args[1]))
        if event == 'open' and str(file) == inside:
            name = 'sync'
        elif str(file).startswith(inside) and of_a_save and creates:
            part = ' part' if '.sharded' in str(file) else ''
            name = EVENTS[event] + (' pointer' if POINTER in file.name else part)
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


def train_in(folder: Path, kind: Kind, said: str, *arguments: str) -> None:
    with (folder / said).open('a') as out, redirect_stdout(out), redirect_stderr(out):
        try:
            place = [str(folder / 'config.py'), '--work-dir', str(folder / 'work')]
            train([*place, *arguments, *kind.arguments])
        except BaseException:
            traceback.print_exc(file=out)
            raise


def run(kind: Kind, folder: Path, prepare: Callable = lambda: None, kill_after: Any = None) -> int:
    resume = ['--resume'] if candidates(folder / 'work') else []
    Shared.reached.value = Shared.events.value = Shared.begun.value = 0
    if (process := os.fork()) == 0:
        status = 1
        try:
            prepare()
            train_in(folder, kind, 'output', *resume)
            status = 0
        finally:
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
        status = run(kind, folder, lambda: watch_saves(folder / 'work', step))
    else:
        status = run(kind, folder, kill_after=(draw.randrange(iterations), draw.uniform(0, 0.5)))
    if status >= 0:
        faults, where = [f'it ended with {status} before it was killed'] * (status > 0), ''
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


def soak(kills: int, seed: int) -> dict[str, Any]:
    draw, counts, faults, references = random.Random(seed), Counter[str](), list[str](), {}
    with tempfile.TemporaryDirectory() as name:
        for title, kind in KINDS.items():
            folder = Path(tempfile.mkdtemp(dir=name))
            kind.write(folder)

            def prepare(folder: Path = folder) -> None:
                steps = (folder / 'steps').open('a', buffering=1)
                watch_saves(folder / 'work', lambda _, name: print(name, file=steps))

            status = run(kind, folder, prepare)
            assert status == 0, (folder / 'output').read_text()[-3000:]
            names = (folder / 'steps').read_text().splitlines()
            references[title] = outcome(folder), names, Shared.reached.value
        while sum(counts.values()) < kills:
            title = list(KINDS)[sum(counts.values()) % len(KINDS)]
            where, found = kill_and_go_on(KINDS[title], Path(name), references[title], draw)
            if where:
                counts[where] += 1
            faults += [f'{title}, killed at {where!r}: {fault}' for fault in found]
            print(f'{title}, killed at {where or "no moment"}: {found or "equal"}', flush=True)
    return {'seed': seed, 'kills': dict(counts), 'faults': faults}


def attempt(kind: Kind, folder: Path, plan: list[dict[str, Any]]) -> None:
    # those of the agent, which a worker of torchrun does not have
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    number = int(os.environ['TORCHELASTIC_RESTART_COUNT'])
    moment = plan[number] if number < len(plan) else None
    if moment is not None and os.environ['RANK'] == str(moment['rank']):
        told = folder / f'killed{number}'
        if moment['step']:
            watch_saves(folder / 'work', dies_at(moment['step'], moment['write'], told))
        ReachedHook.after_train_iter = dies_after(moment['iterations'], told)
    batch = f'train_dataloader.batch_size={300 // int(os.environ["WORLD_SIZE"])}'
    launched = ['--launcher', 'pytorch', '--cfg-options', batch]
    train_in(folder, kind, f'output{os.environ["RANK"]}', *launched)


def dies_after(iterations: int, told: Path) -> Any:
    """A hook's method that kills the rank after so many iterations of an attempt."""
    left = [iterations]

    def after_train_iter(hook: Any, runner: Any, **_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            told.write_text(f'iteration of rank {get_rank()}')
            os.kill(os.getpid(), signal.SIGKILL)

    return after_train_iter


def run_ranks(kind: Kind, folder: Path, ranks: int, plan: list[dict[str, Any]]) -> None:
    config_file = kind.write(folder)
    # more epochs than kills can use up
    config_file.write_text(config_file.read_text().replace('max_epochs=3', 'max_epochs=6'))
    config = LaunchConfig(
        1, 1, ranks, max_restarts=len(plan), start_method='fork', run_id=folder.name,
        rdzv_backend='c10d', rdzv_endpoint='localhost:0', monitor_interval=0.1,
    )  # fmt: skip
    elastic_launch(config, attempt)(kind, folder, plan)


def kill_ranks(kind: Kind, ranks: int, kills: int, draw: random.Random) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        whole, killed = (Path(tempfile.mkdtemp(dir=name)) for _ in range(2))
        run_ranks(kind, whole, ranks, [])
        plan: list[dict[str, Any]] = []
        in_parts = "'sharded'" in kind.config
        for _ in range(kills):
            in_save = draw.random() < (0.8 if in_parts else 0.5)
            rank = draw.randrange(ranks) if in_parts or not in_save else 0
            steps = STEPS_IN_PARTS[min(rank, 1)] if in_parts else STEPS
            in_write = in_parts and draw.random() < 0.2
            moment = dict(rank=rank, step=draw.randint(1, steps) if in_save else 0)
            moment |= dict(write=draw.randrange(1, 20_000) if in_write else None)
            # at the latest: an attempt that gets no further is killed all the same
            latest = kind.interval + 1 if in_save else draw.randint(1, kind.interval)
            plan.append(moment | dict(iterations=latest))
        try:
            run_ranks(kind, killed, ranks, plan)
        except Exception as error:
            said = [(killed / f'output{rank}').read_text()[-1000:] for rank in range(ranks)]
            return {'kills': {}, 'faults': [f'lost: {error} {said}']}
        counts = Counter(path.read_text() for path in killed.glob('killed*'))
        expected, found = outcome(whole), outcome(killed)
        # of two ranks: the sum of more numbers depends on their order
        faults = [f'{k} differs' for k in expected if not same(expected[k], found[k])]
        return {'kills': dict(counts), 'faults': faults}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--ranks', type=int, choices=[2], help='of a training by processes')
    kinds = ['full', 'sharded']
    parser.add_argument('--spread', choices=kinds, help='the model, over ranks, saved in this way')
    parser.add_argument('--out', type=Path, required=True, help='JSON file for the figures')
    args = parser.parse_args()
    torch.set_num_threads(1)
    for package in ('classification', 'segmentation'):
        import_module(f'vqmoe_vision.{package}')
    kind = KINDS['classification']
    if args.spread:
        parallel = f'parallel = dict(expert_processes=2, state_dict_type={args.spread!r})'
        kind = replace(kind, config=f'{kind.config}\n{parallel}\n')
    if args.ranks is None:
        figures = soak(args.kills, args.seed)
    else:
        figures = kill_ranks(kind, args.ranks, args.kills, random.Random(args.seed))
    print(text := json.dumps(figures, indent=2))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(f'{text}\n')
    sys.exit(bool(figures['faults']))
