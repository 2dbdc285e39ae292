"""What `tools/compare.py` does."""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from vqmoe_vision.engine.cli import load_config, make_folder
from vqmoe_vision.engine.command import run
from vqmoe_vision.moe.config import check
from vqmoe_vision.provenance import commit, processor

from . import control
from .check import repeat
from .figures import plot_forest
from .frame import contrasts, forest, tidy
from .measured import measure_routing, measure_shifts
from .queue import Queue, tasks_of
from .report import draw_figures, write_images, write_tables
from .runs import WORK_DIR, Run
from .store import save
from .work import Work

FOREST = Path('work_dirs/comparisons/forest.png')
FIGURE = Path('work_dirs/control/control.png')


def compare(argv: Sequence[str] | None = None) -> None:
    """Compares rows of options over seeds."""
    parser = argparse.ArgumentParser(description='Compare models over seeds.')
    actions = parser.add_subparsers(required=True, metavar='ACTION')
    for action, (function, text) in _ACTIONS.items():
        one = actions.add_parser(action, help=text, description=text)
        one.set_defaults(function=function)
        one.add_argument('spec', help='file in configs/comparisons, or a config that trains')
        if action == 'table':  # p is corrected for all rows, whatever is looked at
            one.set_defaults(rows=None, seeds=None)
        else:
            one.add_argument('--rows', nargs='+', metavar='ROW', help='only these')
            one.add_argument('--seeds', nargs='+', type=int, metavar='SEED', help='only these')
        one.add_argument('--work-dir', type=Path, default=WORK_DIR, help='for runs')
        one.add_argument(
            '--results', type=Path, default=Path('docs/results'), help='for rows and tables'
        )
        one.add_argument('--debug', action='store_true', help='show the full trace of an error')
        if action == 'run':
            one.add_argument('--jobs', type=int, help='at a time (default: one, or one per GPU)')
        if action == 'table':
            one.add_argument(
                '--images', type=Path, metavar='FOLDER', help='write what documents show of it here'
            )
        if action == 'check':
            one.add_argument('--sample', type=int, metavar='N', help='only N rows, drawn at random')
    text = 'draw contrasts of several comparisons, and what they say together'
    one = actions.add_parser('forest', help=text, description=text)
    one.set_defaults(function=_forest, rows=None, seeds=None, work_dir=WORK_DIR)
    one.add_argument('specs', nargs='+', metavar='SPEC', help='files in configs/comparisons')
    one.add_argument('--results', type=Path, default=Path('docs/results'), help='for rows')
    one.add_argument('--out', type=Path, default=FOREST, metavar='FILE.png', help='figure')
    one.add_argument('--debug', action='store_true', help='show the full trace of an error')
    text = 'see which router finds which structure, in tokens with a known answer'
    one = actions.add_parser('control', help=text, description=text)
    one.set_defaults(function=_control)
    one.add_argument('--quick', action='store_true', help='two separations and one seed')
    one.add_argument('--separation', nargs='+', type=float, metavar='S', help='only these')
    one.add_argument('--seeds', nargs='+', type=int, metavar='SEED', help='only these')
    text = "only these, with other options as in 'NAME top_k=1'"
    one.add_argument('--methods', nargs='+', default=[], metavar='ROW', help=text)
    one.add_argument('--out', type=Path, metavar='FILE.json', help='scores; the figure beside it')
    one.add_argument('--debug', action='store_true', help='show the full trace of an error')
    run(parser, argv, lambda args: args.function(args))


def _require_positive(option: str, number: int | None) -> None:
    if number is not None and number < 1:
        raise ValueError(f'{option} {number} must be at least 1')


def _refuse_mistakes(runs: Sequence[Run]) -> None:
    """Builds the model of each row, before the first run."""
    first: dict[tuple[str, str], Run] = {}
    for one in runs:
        first.setdefault((one.comparison.name, one.row), one)
    for config in dict.fromkeys(one.comparison.config for one in runs):
        load_config(config)  # imports the modules that it names
    for one in first.values():
        one.build()


def _run(args: argparse.Namespace) -> None:
    _require_positive('--jobs', args.jobs)
    work = Work(args)
    waiting = work.unfinished()
    print(f'{len(work.runs) - len(waiting)} of {len(work.runs)} runs are there already')
    tasks = tasks_of(waiting, work.store)
    _refuse_mistakes([task.run for task in tasks])
    if sources := [task.name for task in tasks if task.leaves is not None]:
        print(f'{len(sources)} runs that others start from come first: {", ".join(sources)}')
    # a seed of all rows before the next; in it what others start from is the first
    tasks.sort(key=lambda task: work.comparison.seeds.index(task.run.seed))
    queue = Queue(tasks, args.jobs, work.folder / 'PAUSE')
    try:
        failed = queue.work()
    except KeyboardInterrupt:
        raise ValueError('stopped; the same command goes on from the last checkpoints') from None
    if failed:
        raise ValueError(f'{len(failed)} of {len(tasks)} runs failed: {", ".join(failed)}')


def _list(args: argparse.Namespace) -> None:
    tasks = Work(args).current()
    _refuse_mistakes([task.run for task in tasks])
    for task in tasks:
        print(task.line())
    held = [
        task.name
        for task in tasks
        if not all(file.is_file() for _, file in task.run.sources.values())
    ]
    if held:
        count = sum(task.leaves is not None for task in tasks)
        print(
            f'the first {count} lines leave the checkpoints that others start from; '
            f'let them end before the lines of {", ".join(held)}',
            file=sys.stderr,
        )


def _collect(args: argparse.Namespace) -> None:
    work = Work(args)
    waiting = [task for task in work.current() if task.row]
    for folder in dict.fromkeys(task.store.folder for task in waiting):
        make_folder(folder)
    found, damaged = 0, []
    for task in waiting:
        try:
            found += task.collect()
        except ValueError as error:
            damaged.append(task.name)
            print(f'left out: {task.name}: {error}', file=sys.stderr)
    unfinished = len(waiting) - found - len(damaged)
    print(f'{found} runs collected, {unfinished} are not finished')
    if damaged:
        raise ValueError(f'results of {len(damaged)} runs are damaged: {", ".join(damaged)}')


def _table(args: argparse.Namespace) -> None:
    work = Work(args)
    made = work.comparison, work.read()
    folder = args.results / 'tables'
    written = [*write_tables(*made, folder), *draw_figures(*made, folder)]
    if args.images is not None:
        written += write_images(*made, args.images)
    print(*written, sep='\n')


def _forest(args: argparse.Namespace) -> None:
    found, margins = {}, set()
    for spec in args.specs:
        work = Work(argparse.Namespace(**{**vars(args), 'spec': spec}))
        results = work.read()
        values = tidy(work.comparison, results)
        found[work.comparison.name] = contrasts(work.comparison, results, values)
        margins.add(work.comparison.margin)
    frame = forest(found)
    if frame.empty:
        raise ValueError(f'contrasts: the rows of none are finished in {", ".join(found)}')
    print(frame.to_markdown(index=False, floatfmt='+.2f'))
    make_folder(args.out.parent)
    margin = margins.pop() if len(margins) == 1 else None
    plot_forest(frame, margin).savefig(args.out, dpi=110)
    print(args.out)


def _shifts(args: argparse.Namespace) -> None:
    work = Work(args)
    if not work.comparison.shifts:
        raise ValueError(f'{args.spec}: shifts names none')
    store, _ = work.own('tested')
    _say_absent(measure_shifts(work.runs, store))


def _routing(args: argparse.Namespace) -> None:
    work = Work(args)
    if not work.comparison.tested:
        raise ValueError(f"{args.spec}: routing is measured on test data, which stage='dev' spares")
    store, _ = work.own('measured')
    _say_absent(measure_routing(work.runs, store))


def _say_absent(names: list[str]) -> None:
    if names:
        print(f'no checkpoint is here of the training of: {", ".join(names)}')


def _check(args: argparse.Namespace) -> None:
    work = Work(args)
    _require_positive('--sample', args.sample)
    _, usable = work.own('checked', refuted=True)
    runs = [one for one in work.runs if (one.row, one.seed) in usable]
    if args.sample is not None:
        runs = random.sample(runs, min(args.sample, len(runs)))
    wrong, unknown = [], []
    for one in tqdm(runs, unit='row', disable=None):
        try:
            finding = repeat(one, usable[one.row, one.seed])
        except ValueError as error:
            unknown.append(one.name)
            tqdm.write(str(error))
            continue
        work.store.add(one, checked=finding)
        if not finding['equal']:
            wrong.append(one.name)
            tqdm.write(f'{one.name} is stale: {finding["finding"]}')
    came = len(runs) - len(wrong) - len(unknown)
    print(f'the first losses of {came} of {len(runs)} rows came out again')
    found = {'are stale': wrong, 'cannot be repeated': unknown}
    if wrong or unknown:
        raise ValueError(
            '; '.join(
                f'{len(names)} rows {what}: {", ".join(names)}'
                for what, names in found.items()
                if names
            )
        )


def _control(args: argparse.Namespace) -> None:
    separations = args.separation or control.SEPARATIONS[args.quick]
    seeds = args.seeds or control.SEEDS[args.quick]
    for separation in separations:
        check(0 < separation < math.inf, '--separation', separation, 'above 0 and finite')
    for seed in seeds:
        check(0 <= seed < 2**63, '--seeds', seed, 'at least 0 and below 2**63')
    rows, out = control.find_rows(args.methods), args.out or FIGURE
    make_folder(out.parent)  # before the work
    torch.set_num_threads(1)  # more would wait for one another in layers of this size
    runs = list(product(rows, dict.fromkeys(separations), dict.fromkeys(seeds)))
    scores = [
        control.score(row, control.Structure(separation, seed=seed))
        for row, separation, seed in tqdm(runs, unit='run', disable=None)
    ]
    print(control.table_of(scores))
    control.plot_control(scores).savefig(out.with_suffix('.png'), dpi=100)
    print(out.with_suffix('.png'))
    if args.out is not None:
        made = {'commit': commit(), 'processor': processor(), 'core_seconds': time.process_time()}
        save(out, {**made, 'rows': [asdict(one) for one in scores]})


_ACTIONS = {
    'run': (_run, 'work through all runs that have no results yet'),
    'list': (_list, 'print the commands of those runs, one a line, for a scheduler'),
    'collect': (_collect, 'take up the results of runs that a scheduler has finished'),
    'table': (_table, 'make tables and learning curves from the results'),
    'shifts': (_shifts, 'test finished runs under the shifts that the comparison names'),
    'routing': (_routing, 'measure what the routing of finished runs is like'),
    'check': (_check, 'repeat the first losses of runs that have results'),
}
