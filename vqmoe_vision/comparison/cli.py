"""What `tools/compare.py` does."""

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vqmoe_vision.arguments import parser_of
from vqmoe_vision.engine.checkpoint_files import write_atomically
from vqmoe_vision.engine.cli import load_config, make_folder, run
from vqmoe_vision.engine.config import parse_options
from vqmoe_vision.engine.escaping import printable
from vqmoe_vision.moe.config import check
from vqmoe_vision.provenance import commit, processor

from . import control
from .figures import plot_forest
from .frame import Made, forest, tidy
from .measured import check_shifts, measure_routing, measure_shifts
from .pages import fill
from .queue import Queue, Task, tasks_of
from .report import draw_figures, write_tables
from .scenes import SCENES
from .spec import choose, read_comparison
from .store import (
    ONE_THREAD,
    Results,
    Run,
    Store,
    Usable,
    has_checkpoint,
    leave_out_other_inputs,
    load,
    noise_of,
    save,
)
from .trackers import to_trackio


def compare(argv: Sequence[str] | None = None) -> None:
    """Compares rows of options over seeds."""
    run(parser_of('compare'), argv, lambda args: _ACTIONS[args.action](args))


class Work:
    """The rows and seeds that an action was asked for, and what is there of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.comparison = read_comparison(args.spec)
        self._all = [
            Run(self.comparison, *place, args.work_dir) for place in self.comparison.selected()
        ]
        chosen = self.comparison.selected(args.rows, args.seeds)
        self.runs = [one for one in self._all if one.place in chosen]
        for one in self.runs:  # a mistake in any of them is found before the first starts
            one.folder  # noqa: B018
        check_shifts(self._all[0])
        self.folder = args.work_dir / self.comparison.name
        self._rows = args.results / 'rows'
        self.store = Store(self._rows / self.comparison.name)

    def read(self) -> Results:
        """What is there of the whole comparison, with a line for all that is left out."""
        results = self.store.read(self._all)
        there = {*self.store.folder.glob('*-seed*.json')} - {*map(self.store.path, self._all)}
        if there:
            names = ', '.join(sorted(path.name for path in there))
            results.left_out[names] = 'the comparison names no such row or seed'
        # what was trained in the same way for the comparison that rows start from counts here too
        if self.comparison.start is not None:
            other = Store(self._rows / self.comparison.start[0].name)
            results.usable.update(other.read(results.missing).usable)
        results.stored = {*results.usable}  # one of other inputs would end as it did
        leave_out_other_inputs(results, self._all)
        for name, reason in results.left_out.items():
            print(printable(f'left out: {name}: {reason}'), file=sys.stderr)
        results.missing = [r for r in results.missing if r.place not in results.stored]
        results.noise = noise_of(self.store.folder, results.usable)
        return results

    def own(self, what: str, refuted: bool = False) -> tuple[list[Run], Usable]:
        """Runs whose own rows count, to be done something with."""
        results = self.store.read(self.runs, refuted)
        if not results.usable:
            name = self.comparison.name
            raise ValueError(f'no run of {name} can be {what}{results.why_none}')
        make_folder(self.store.folder)
        return [one for one in self.runs if one.place in results.usable], results.usable


def _run(args: argparse.Namespace) -> None:
    check(args.jobs is None or args.jobs > 0, '--jobs', args.jobs, 'at least 1')
    work = Work(args)
    stored = work.read().stored
    waiting = [one for one in work.runs if one.place not in stored]
    print(f'{len(work.runs) - len(waiting)} of {len(work.runs)} runs are there already')
    tasks = tasks_of(waiting, work.store, args.processes_per_run or 1)
    # the model of each row is built before the first run
    first = {(task.run.comparison.name, task.run.row): task.run for task in reversed(tasks)}
    for config in {one.comparison.config for one in first.values()}:
        load_config(config)  # imports the modules that it names
    for one in reversed(first.values()):
        one.build()
    if sources := [task.name for task in tasks if task.leaves is not None]:
        print(f'{len(sources)} runs that others start from come first: {", ".join(sources)}')
    # a seed of all rows before the next; in it what others start from is the first
    tasks.sort(key=lambda task: work.comparison.seeds.index(task.run.seed))
    queue = _queue(args, tasks, work.folder / 'PAUSE')
    try:
        failed = queue.work()
    except KeyboardInterrupt:
        raise ValueError(queue.stopped) from None
    if failed:
        raise ValueError(f'{len(failed)} of {len(tasks)} runs failed: {", ".join(failed)}')


def _queue(args: argparse.Namespace, tasks: list[Task], pause: Path) -> Queue:
    for name in ('processes_per_run', 'minutes'):
        value, allowed = getattr(args, name), 'at least 1, with --executor'
        valid = value is None or (args.executor is not None and value > 0)
        check(valid, f'--{name.replace("_", "-")}', value, allowed)
    fits = args.slurm is None or args.executor == 'slurm'
    check(fits, '--slurm', args.slurm, 'left out without --executor slurm')
    if args.executor is None or not tasks:
        return Queue(tasks, args.jobs, pause)
    _require('submitit', '--executor')
    from .executor import Submitted

    more = parse_options(args.slurm or ())
    return Submitted(tasks, args.jobs, pause, args.executor, args.minutes, more)


def _table(args: argparse.Namespace) -> None:
    work = Work(args)
    made = work.comparison, work.read(), args.results / 'tables'
    print(*write_tables(*made), *draw_figures(*made, args.images), sep='\n')


def _made(args: argparse.Namespace, spec: str) -> Made:
    work = Work(argparse.Namespace(**vars(args), spec=spec))
    made = work.comparison, work.read()
    return Made(*made, tidy(*made))


def _forest(args: argparse.Namespace) -> None:
    found, margins = {}, set()
    for spec in args.specs:
        made = _made(args, spec)
        found[made.comparison.name] = made
        margins.add(made.comparison.margin)
    frame = forest(found, args.contrasts or ())
    if frame.empty:
        raise ValueError(f'contrasts: the rows of none are finished in {", ".join(found)}')
    # A single comparison predicts nothing; tabulate takes None for missing, and nan for a number.
    cells = frame.astype(object).where(frame.notna(), None)
    print(cells.to_markdown(index=False, floatfmt='+.2f', missingval='-'))
    make_folder(args.out.parent)
    plot_forest(frame, margins.pop() if len(margins) == 1 else None).savefig(args.out, dpi=110)
    print(args.out)


def _pages(args: argparse.Namespace) -> None:
    @cache
    def find(name: str) -> Made:
        return _made(args, f'configs/comparisons/{name}.py')

    for page in args.pages:
        write_atomically(page, fill(page.read_text(), find, args.results).encode())
        print(page)


def _measure(args: argparse.Namespace) -> None:
    work = Work(args)
    if args.action == 'shifts' and not work.comparison.shifts:
        raise ValueError(f'{args.spec}: shifts names none')
    if not work.comparison.tested:
        raise ValueError(f"{args.spec}: routing is measured on test data, which stage='dev' spares")
    runs, usable = work.own('measured')
    here = [one for one in runs if has_checkpoint(one, usable[one.place])]
    (measure_shifts if args.action == 'shifts' else measure_routing)(here, usable, work.store)
    if names := [one.name for one in runs if one not in here]:
        print(f'no checkpoint is here of the training of: {", ".join(names)}')


def _check(args: argparse.Namespace) -> None:
    work = Work(args)
    check(args.sample is None or args.sample > 0, '--sample', args.sample, 'at least 1')
    runs, usable = work.own('checked', refuted=True)
    if args.sample is not None:
        runs = random.sample(runs, min(args.sample, len(runs)))
    failed = []
    for one in tqdm(runs, unit='row', disable=None):
        try:
            finding = repeat(one, usable[one.place])
            work.store.add(one, checked=finding)
            if not finding['equal']:
                raise ValueError(f'{one.name} is stale: {finding["finding"]}')
        except ValueError as error:
            failed.append(one.name)
            tqdm.write(str(error))
    print(f'the first losses of {len(runs) - len(failed)} of {len(runs)} rows came out again')
    if failed:
        raise ValueError(f'{len(failed)} rows did not come out again: {", ".join(failed)}')


def _export(args: argparse.Namespace) -> None:
    work = Work(args)
    usable = work.own('exported')[1]
    _require(args.to, f'--to {args.to}')
    to_trackio(work.comparison, usable)
    name = work.comparison.name
    print(f'{len(usable)} runs; to look at them: trackio show --project {name}')


def _require(package: str, option: str) -> None:
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"{option} needs {package}: pip install '.[frameworks]'")


def _control(args: argparse.Namespace) -> None:
    of = SCENES if args.images else control.PLANTED
    separations = args.separation or of.separations[args.quick]
    seeds = args.seeds or of.seeds[args.quick]
    apart = all(0 < s < math.inf for s in separations)
    check(apart, '--separation', separations, 'above 0 and finite')
    check(all(0 <= seed < 2**63 for seed in seeds), '--seeds', seeds, 'from 0 to 2**63 - 1')
    check(not (args.images and args.generator), '--generator', args.generator, 'of tokens alone')
    generators = choose('--generator', args.generator or ['clusters_8'], control.GENERATORS)
    name = 'images' if args.images else 'control'
    rows, out = control.find_rows(args.methods), args.out or Path(f'work_dirs/control/{name}.json')
    make_folder(out.parent)  # before the work
    torch.set_num_threads(1)  # more would wait for one another in layers of this size
    structures = {'images': of}
    if not args.images:
        structures = {name: replace(of, layout=control.GENERATORS[name]) for name in generators}
    runs = list(product(structures, rows, dict.fromkeys(separations), dict.fromkeys(seeds)))
    scores = [
        {'generator': name, **control.score(row, s, seed, of=structures[name])}
        for name, row, s, seed in tqdm(runs, unit='run', disable=None)
    ]
    print(control.table_of(scores))
    figure = control.plot_control(scores, structures[runs[0][0]])
    figure.savefig(out.with_suffix('.png'), dpi=100)
    print(out.with_suffix('.png'))
    if args.out is not None:
        made = {'commit': commit(), 'processor': processor(), 'core_seconds': time.process_time()}
        save(out, {**made, 'rows': scores})


_ACTIONS = {
    'run': _run, 'table': _table, 'shifts': _measure, 'routing': _measure, 'check': _check,
    'export': _export, 'forest': _forest, 'pages': _pages, 'control': _control,
}  # fmt: skip


TOLERANCE = 1e-3  # relative: another processor rounds differently


def repeat(run: Run, content: dict[str, Any]) -> dict[str, Any]:
    """Trains for as many iterations as a row keeps losses of, and compares them."""
    with tempfile.TemporaryDirectory() as folder:
        processes = content.get('processes', 1)
        more = 'default_hooks.record.only_first=True'
        command = run.train(Path(folder), more, processes=processes)
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **ONE_THREAD}
        )
        if done.returncode != 0:
            last = (done.stderr.strip() or 'killed').splitlines()[-1]
            raise ValueError(f'{run.name} cannot be repeated: {last}')
        record = load(Path(folder) / 'run.json')
    weights = record['starting_weights']
    if content.get('starting_weights', weights) != weights:
        there = ', '.join(f'{name} ({digest})' for name, digest in weights.items())
        raise ValueError(f'{run.name} cannot be repeated: it began with other weights than {there}')
    return {'commit': commit(), **compared(record['first_losses'], content['first_losses'])}


def compared(losses: Sequence[float], kept: Sequence[float]) -> dict[str, Any]:
    """Whether losses came out again; those that are no number never did."""
    off = np.abs(np.subtract(losses, kept)) / np.where(kept, np.abs(kept), 1)
    worst = int(off.argmax())  # the first nan, if there is one
    largest = float(off[worst])
    return {
        'equal': largest <= TOLERANCE,
        'finding': f'loss {worst + 1} is {losses[worst]:.6g}, was {kept[worst]:.6g}',
        'largest_relative_difference': largest if math.isfinite(largest) else None,
    }
