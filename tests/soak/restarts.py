"""Kills ranks of trainings under torchrun's agent, which starts them again, and compares.

    python tests/soak/restarts.py --ranks 2 4 --kills 10 --seed 0 --out work_dirs/soak/restarts.json

The agent is the one of `torchrun --max-restarts=KILLS`, but forks its workers from this process,
which has imported everything. Each attempt but the last one is killed: a random rank after a random
iteration, or a rank that saves at a step of a save or in the middle of a write.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from kills import ReachedHook, dies_at, outcome, watch_saves
from kinds import KINDS, Kind, same
from mmengine.dist import get_rank
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from vqmoe_vision.engine.cli import train

ROUNDING = 1e-3
STEPS = 6  # of the saves of an attempt, at one of which it may be killed
# in parts: of the first rank, and of another, which creates the folder and its file
STEPS_IN_PARTS = (16, 2)


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
    out = (folder / f'output{os.environ["RANK"]}').open('a')
    with out, redirect_stdout(out), redirect_stderr(out):
        try:
            arguments = [str(folder / 'config.py'), '--work-dir', str(folder / 'work')]
            batch = f'train_dataloader.batch_size={300 // int(os.environ["WORLD_SIZE"])}'
            launched = ['--launcher', 'pytorch', '--cfg-options', batch]
            train([*arguments, *launched, *kind.arguments])
        except BaseException:
            traceback.print_exc(file=out)
            raise


def dies_after(iterations: int, told: Path) -> Any:
    """A hook's method that kills the rank after so many iterations of an attempt."""
    left = [iterations]

    def after_train_iter(hook: Any, runner: Any, **_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            told.write_text(f'iteration of rank {get_rank()}')
            os.kill(os.getpid(), signal.SIGKILL)

    return after_train_iter


def run(kind: Kind, folder: Path, ranks: int, plan: list[dict[str, Any]]) -> None:
    config_file = kind.write(folder)
    # more epochs than kills can use up
    config_file.write_text(config_file.read_text().replace('max_epochs=3', 'max_epochs=6'))
    config = LaunchConfig(
        1, 1, ranks, max_restarts=len(plan), start_method='fork', run_id=folder.name,
        rdzv_backend='c10d', rdzv_endpoint='localhost:0', monitor_interval=0.1,
    )  # fmt: skip
    elastic_launch(config, attempt)(kind, folder, plan)


def alike(a: Any, b: Any, ranks: int) -> bool:
    """Whether two values are equal; with more than two ranks but for rounding.

    DistributedDataParallel sorts gradients into new buckets after the first iteration of each
    attempt, and gloo adds up the parts of a bucket beginning at different ranks. The sum of two
    numbers is the same in both orders, and the sum of more is not.
    """
    if ranks == 2 or same(a, b):
        return same(a, b)
    try:
        torch.testing.assert_close(a, b, rtol=ROUNDING, atol=ROUNDING)
    except AssertionError as error:
        print(str(error)[:800], flush=True)
        return False
    return True


def soak(kind: Kind, ranks: int, kills: int, draw: random.Random) -> tuple[Counter, list[str]]:
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / 'whole', Path(name) / 'killed'
        whole.mkdir()
        killed.mkdir()
        run(kind, whole, ranks, [])
        plan = []
        in_parts = "'sharded'" in kind.config
        for _ in range(kills):
            in_save = draw.random() < (0.8 if in_parts else 0.5)
            rank = draw.randrange(ranks) if in_parts or not in_save else 0
            steps = STEPS_IN_PARTS[min(rank, 1)] if in_parts else STEPS
            in_write = in_parts and draw.random() < 0.2
            plan.append(
                {
                    'rank': rank,
                    'step': draw.randint(1, steps) if in_save else 0,
                    'write': draw.randrange(1, 20_000) if in_write else None,
                    # at the latest: an attempt that gets no further is killed all the same
                    'iterations': kind.interval + 1 if in_save else draw.randint(1, kind.interval),
                }
            )
        try:
            run(kind, killed, ranks, plan)
        except Exception as error:
            said = [(killed / f'output{rank}').read_text()[-1000:] for rank in range(ranks)]
            return Counter(), [f'lost: {error} {said}']
        counts = Counter(path.read_text() for path in killed.glob('killed*'))
        expected, found = outcome(whole), outcome(killed)
        return counts, [f'{k} differs' for k in expected if not alike(expected[k], found[k], ranks)]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--ranks', type=int, nargs='+', default=[2, 4])
    parser.add_argument('--kills', type=int, default=10)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--spread', choices=['full', 'sharded'], help='the model, over all ranks, saved in this way'
    )
    parser.add_argument('--out', type=Path, help='JSON file for the figures')
    args = parser.parse_args()
    torch.set_num_threads(1)
    for package in ('classification', 'segmentation'):
        import_module(f'vqmoe_vision.{package}')
    kind = KINDS['classification']
    if args.spread:
        parallel = f'parallel = dict(expert_processes=2, state_dict_type={args.spread!r})'
        kind = replace(kind, config=f'{kind.config}\n{parallel}\n')
    figures: dict[str, Any] = {}
    for ranks in args.ranks:
        counts, faults = soak(kind, ranks, args.kills, random.Random(args.seed))
        figures[str(ranks)] = {'kills': dict(counts), 'faults': faults}
        print(f'{ranks} ranks: {figures[str(ranks)]}', flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(figures, indent=2) + '\n')
    sys.exit(any(one['faults'] for one in figures.values()))
