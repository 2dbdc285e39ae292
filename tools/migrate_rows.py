# ruff: noqa: E501
"""Rows of version 1 to version 2, once: recipes, names, checks folded in. Run at the root:

    PYTHONPATH=$PWD python migrate60.py [--write]

A row is written only if the recipe of its own config, with the options of MoE layers that it was
trained with, is that of today's, and no check has refuted it. Old files are removed at the end.
"""

import json
import re
import sys
from pathlib import Path

from vqmoe_vision.comparison import recipe as R
from vqmoe_vision.comparison.runs import Run, budget_of
from vqmoe_vision.comparison.spec import read_comparison
from vqmoe_vision.comparison.store import _RECORDED, VERSION, damage, images_seen, refutation, save
from vqmoe_vision.engine.options import flat

ROOT, ROWS = Path('work_dirs/comparisons'), Path('docs/results/rows')
PATH = re.compile(r'^(?:.*/)?(\w+)/([\w.]+)-seed(\d+)-[0-9a-f]{8}/([\w.]+\.pth)$')


def new(row):
    row = re.sub(r'^dense_wide$', 'dense_2x', row)
    row = re.sub(r'^dense(?=$|_started$)', 'dense_1x', row)
    return re.sub(r'^hashmoe(?=$|_)', 'position', row)


def old_recipe(content, check, run):
    """By the row's own config and options; sources by what their row's recipe is today."""
    runs = {(r.comparison.name, r.row, r.seed): r for r, _ in run.sources.values()}
    ends = {}
    for value in flat(content['config']).values():
        found = PATH.match(value) if isinstance(value, str) else None
        if found:
            comparison, row, seed, file = found.groups()
            source = runs[comparison, new(row), int(seed)]
            ends['/'.join(value.split('/')[-3:])] = '/'.join(
                (comparison, source.row, source.recipe, file)
            )
    then = R.canonical(content['config'], ends)
    options = content.get('moe_options', (check or {}).get('moe_options'))
    assert options is not None, (run.name, 'no options')
    for name, value in flat({'moe': options}).items() if options else ():
        value = R._plain(value, {})
        if value in ({}, []):
            continue
        assert name in then, (run.name, 'an option that today has not', name)
        then[name] = value  # as it was trained; _ADDED and _REMOVED are in the form already
    import hashlib

    return hashlib.sha256(json.dumps(then, sort_keys=True).encode()).hexdigest()[:16], then


def migrate(folder, write):
    comparison = read_comparison(f'configs/comparisons/{folder.name}.py')
    checks_file = folder / 'checks.json'
    checks = json.loads(checks_file.read_text()) if checks_file.exists() else {}
    runs = {(row, seed): Run(comparison, row, seed, ROOT) for row, seed in comparison.selected()}
    budget, made, left = budget_of(comparison), {}, []
    for path in sorted(folder.glob('*-seed*.json')):
        c = json.loads(path.read_text())
        if c['version'] == VERSION:
            continue
        assert c['version'] == 1
        key = new(c['row']), c['seed']
        if key not in runs:
            left.append(path.name)
            continue
        run, check = runs[key], checks.get(path.stem)
        if check is not None:
            assert check['losses'] == c['first_losses'] and check['equal'], path
        found, form = old_recipe(c, check, run)
        if found != run.recipe:
            sources = {
                f.relative_to(run.root).as_posix(): '/'.join(
                    (r.comparison.name, r.row, r.recipe, f.name)
                )
                for r, f in run.sources.values()
            }
            today = R.canonical(run.resolved, sources)
            raise SystemExit(
                f'{path}: '
                + str(
                    {
                        k: (form.get(k), today.get(k))
                        for k in form.keys() | today.keys()
                        if form.get(k) != today.get(k)
                    }
                )
            )
        held_out = list({step: [step, value] for step, value in c['held_out']}.values())
        row = {'version': VERSION, 'row': run.row, 'recipe': run.recipe, 'budget': budget}
        row |= {name: c[name] for name in _RECORDED if name in c}
        if 'starting_weights' not in row and 'starting_weights' in (check or {}):
            row['starting_weights'] = check['starting_weights']
        row |= {
            'images': images_seen(c['config'], c),
            'metric': c['metric'],
            'stage': c.get('stage', 'test'),
            'test': c['test'],
            'held_out': held_out,
        }
        row |= {name: c[name] for name in ('shifts', 'shift_routing', 'routing') if name in c}
        if check is not None:
            row['checked'] = {
                n: check[n] for n in ('commit', 'equal', 'finding', 'largest_relative_difference')
            }
        # the order of a row that is collected, with what is found later behind it
        assert damage(row, run) is None and refutation(row) is None, path
        made[path] = (folder / f'{run.name}.json', row)
    print(
        folder.name,
        len(made),
        'rows',
        sum(len(json.dumps(r)) for _, r in made.values()) // max(len(made), 1),
        'bytes; left:',
        left,
    )
    if write:
        for path, (_, _) in made.items():
            path.unlink()
        for path, row in made.values():
            save(path, row)
        checks_file.unlink(missing_ok=True)


for folder in sorted(ROWS.iterdir()):
    migrate(folder, '--write' in sys.argv)
