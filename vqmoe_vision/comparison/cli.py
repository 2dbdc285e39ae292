"""What `tools/compare.py` does."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from vqmoe_vision.engine.command import run

from .check import repeat
from .inputs import without_other_inputs
from .mistakes import refuse_mistakes
from .noise import PAIRS, noise_of
from .outcome import Outcome
from .queue import Queue
from .report import draw_figures, write_images, write_tables
from .results import Results, Usable
from .routing import measure_routing
from .runs import WORK_DIR, Run
from .shared import completed
from .shifts import check_shifts, measure_shifts
from .spec import read_comparison
from .store import Store
from .tasks import Task, tasks_of


def compare(argv: Sequence[str] | None = None) -> None:
    """Compares rows of options over seeds.

    Args:
        argv: Command line without the program's name; None takes it from `sys.argv`.
    """
    parser = argparse.ArgumentParser(description='Compare models over seeds.')
    actions = parser.add_subparsers(required=True, metavar='ACTION')
    for action, (function, text) in _ACTIONS.items():
        one = actions.add_parser(action, help=text, description=text)
        one.set_defaults(function=function)
        one.add_argument('spec', help='file in configs/comparisons, or a config that trains')
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
    run(parser, argv, lambda args: args.function(args))


class _Work:
    """What every action begins with; `whole` takes all rows and seeds, whatever was asked for."""

    def __init__(self, args: argparse.Namespace, whole: bool = False) -> None:
        self.comparison = read_comparison(args.spec)
        name = self.comparison.name
        part = () if whole else (args.rows, args.seeds)
        self._all = [
            Run(self.comparison, row, seed, args.work_dir)
            for row, seed in self.comparison.selected()
        ]
        self._chosen = set(self.comparison.selected(*part))
        self.runs = [one for one in self._all if (one.row, one.seed) in self._chosen]
        for one in self.runs:  # a mistake in any of them is found before the first starts
            one.folder  # noqa: B018
        check_shifts(self._all[0])
        self.folder = args.work_dir / name
        rows = args.results / 'rows'
        self.store = Store(rows / name)
        start = self.comparison.start
        self._others = [] if start is None else [Store(rows / start.comparison.name)]

    def read(self) -> Results:
        """What is there, with a line for all that is left out."""
        return self._read()[0]

    def unfinished(self) -> list[Run]:
        """The runs that have no results yet, or none that count.

        One of other inputs is none of them: to repeat it with these would take hours at each call.
        """
        _, stored = self._read()
        return [one for one in self.runs if (one.row, one.seed) not in stored]

    def _read(self) -> tuple[Results, set[tuple[str, int]]]:
        """What counts, and which rows are there, those of other inputs among them."""
        results = self.store.read(self._all)  # what most were given is a matter of the whole
        if others := self.store.unnamed(self._all):
            results.left_out[', '.join(others)] = 'the comparison names no such row or seed'
        # what was trained in the same way for the comparison that rows start from counts here too
        for other in self._others:
            results = completed(results, other)
        stored = set(results.usable)
        results = without_other_inputs(results).restricted(self._chosen, self.comparison.selected())
        for name, reason in results.left_out.items():
            print(f'left out: {name}: {reason}', file=sys.stderr)
        return results, stored

    def own(self, what: str, checked: bool = True) -> tuple[Store, Usable]:
        """Its rows and what counts of them, which is to be done something with.

        A line says which rows count and are of the comparison it starts from.

        Args:
            what: The end of a sentence that says that nothing can be, such as 'checked'.
            checked: Leave out what a check has found to be stale.

        Raises:
            ValueError: None counts.
        """
        missing = self.store.read(self.runs).missing
        for other in self._others:
            if names := [f'{row}-seed{seed}' for row, seed in other.read(missing).usable]:
                print(
                    f'{len(names)} rows are those of {other.folder.name}, with which this has to '
                    f'be done for them: {", ".join(names)}',
                    file=sys.stderr,
                )
        results = self.store.read(self.runs, checked)
        if not results.usable:
            name = self.comparison.name
            raise ValueError(f'no run of {name} can be {what}{results.why_none}')
        return self.store, results.usable

    def current(self) -> list[Task]:
        """What is left to do for those, but where a work dir holds what may not be gone on with."""
        tasks: list[Task] = []
        left: set[Path] = set()
        for task in tasks_of(self.unfinished(), self.store):  # first what others start from
            sources = [first for first, _ in task.run.sources.values() if first.folder in left]
            reason = task.store.stale(task.run)
            if reason is not None:
                what = f'what {task.run.folder} holds is {reason}'
            elif sources:
                what = f'it starts from {sources[0].name}, which is left out'
            else:
                tasks.append(task)
                continue
            left.add(task.run.folder)
            print(
                f'left out: {task.name}: {what}; the action run sets aside what is stale and '
                'begins anew',
                file=sys.stderr,
            )
        return tasks


def _require_positive(option: str, number: int | None) -> None:
    if number is not None and number < 1:
        raise ValueError(f'{option} {number} must be at least 1')


def _run(args: argparse.Namespace) -> None:
    _require_positive('--jobs', args.jobs)
    work = _Work(args)
    waiting = work.unfinished()
    print(f'{len(work.runs) - len(waiting)} of {len(work.runs)} runs are there already')
    tasks = tasks_of(waiting, work.store)
    refuse_mistakes([task.run for task in tasks])
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
    tasks = _Work(args).current()
    refuse_mistakes([task.run for task in tasks])
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
    work = _Work(args)
    waiting = [task for task in work.current() if task.row]
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
    work = _Work(args, whole=True)  # p is corrected for all rows, whatever is shown
    outcome = Outcome(work.comparison, work.read(), args.rows, args.seeds)
    made = outcome, args.results / 'tables'
    images = [] if args.images is None else write_images(outcome, args.images)
    for path in [*write_tables(*made), *draw_figures(*made), *images]:
        print(path)


def _shifts(args: argparse.Namespace) -> None:
    work = _Work(args)
    if not work.comparison.shifts:
        raise ValueError(f'{args.spec}: shifts names none')
    store, _ = work.own('tested')
    _say_absent(measure_shifts(work.runs, store))


def _routing(args: argparse.Namespace) -> None:
    work = _Work(args)
    if not work.comparison.tested:
        raise ValueError(f"{args.spec}: routing is measured on test data, which stage='dev' spares")
    store, _ = work.own('measured')
    _say_absent(measure_routing(work.runs, store))


def _say_absent(names: list[str]) -> None:
    if names:
        print(f'checkpoints are not here: {", ".join(names)}')


def _check(args: argparse.Namespace) -> None:
    work = _Work(args)
    _require_positive('--sample', args.sample)
    work.store.checks()  # what is found goes there: if it cannot, that is said before it is sought
    _, usable = work.own('checked', checked=False)
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
        work.store.keep_check(one, finding)
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


def _noise(args: argparse.Namespace) -> None:
    work = _Work(args, whole=True)  # differences are to the reference, whatever is shown
    outcome = Outcome(work.comparison, work.read(), args.rows, args.seeds)
    frame, budget = noise_of(work.comparison, outcome.results)
    known = frame.astype(object).where(frame.notna(), None)
    print(known.to_markdown(floatfmt=('', '.0f', '.2f', '.0f', '.2f', '.2f'), missingval='-'))
    print(
        f'\n{PAIRS} paired seeds detect a difference of {budget:.2f} in {work.comparison.metric} '
        'with 80 % power at the 5 % level, if the noise is that of all rows together.'
    )


_ACTIONS = {
    'run': (_run, 'work through all runs that have no results yet'),
    'list': (_list, 'print the commands of those runs, one a line, for a scheduler'),
    'collect': (_collect, 'take up the results of runs that a scheduler has finished'),
    'table': (_table, 'make tables and learning curves from the results'),
    'shifts': (_shifts, 'test finished runs under the shifts that the comparison names'),
    'routing': (_routing, 'measure what the routing of finished runs is like'),
    'check': (_check, 'repeat the first losses of runs that have results'),
    'noise': (_noise, 'say which differences the seeds of this budget allow to be seen'),
}
