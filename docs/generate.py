"""Writes what stands below a comment line of pages in docs/reference: `make reference`."""

import argparse
import importlib
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import timm
import torch

import vqmoe_vision.segmentation  # noqa: F401  what configs name
from vqmoe_vision.arguments import TOOLS, parser_of
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.models import MoeVisionTransformer, complexity
from vqmoe_vision.models.upcycle import Upcycling
from vqmoe_vision.models.vit_moe import SIZES
from vqmoe_vision.moe import METHODS, MoeConfig

ROOT = Path(__file__).parents[1]
PACKAGES = ['', '.moe', '.models', '.analysis', '.classification', '.segmentation', '.engine']
IMPORT = re.compile(r'^from (vqmoe_vision[\w.]*) import ([\w, ]+)', re.MULTILINE)


def table(head: str, rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    cells = [[' '.join(str(cell).split()).replace('<', '&lt;') for cell in row] for row in rows]
    lines = [head.split(', '), ['---'] * len(head.split(', ')), *cells] if cells else []
    yield '\n'.join(f'|{"|".join(line)}|' for line in lines)


def sentence(text: str) -> str:
    return re.split(r'(?<=\.)\s+(?=[A-Z`])', ' '.join(text.split('\n\n')[0].split()))[0]


def arguments(of: Any) -> dict[str, str]:
    section = re.search(r'(?ms)^Args:\n(.*?)(?=^\S|\Z)', inspect.getdoc(of) or '')
    found = re.findall(r'(?ms)^    (\w+): (.*?)(?=^    \S|\Z)', section[1] if section else '')
    return {name: ' '.join(text.split()) for name, text in found}


def option_table(config: Any, base: Any = None) -> Iterator[str]:
    """Fields that the base lacks; the class that explains one need not be the one that has it."""
    types, rows = get_type_hints(config), []
    old = {each.name for each in fields(base)} if base else set()
    for each in fields(config):
        if each.name not in old:
            kind = f'{types[each.name]} {each.metadata.get("bounds") or ""}'.replace(' |', ' or')
            kind = re.sub(r"typing\.Literal\[(.*)\]|<class '(\w+)'>", r'\1\2', kind)
            told = [text for c in config.__mro__ if (text := arguments(c).get(each.name))]
            rows.append((f'`{each.name}`', f'`{kind.strip()}`', f'`{each.default!r}`', told[0]))
    yield from table('option, type and bounds, default, meaning', rows)


def options() -> Iterator[str]:
    told = arguments(MoeVisionTransformer)
    yield from ['## Every model', *(f'`{n}`: {told[n]}' for n in ('moe_layers', 'upcycling'))]
    yield from [*option_table(Upcycling), '## Every method', *option_table(MoeConfig)]
    names = {METHODS[name].config: name for name in METHODS}
    for method in METHODS:
        bases = METHODS[method].config.__mro__[1:]
        base = next((each for each in bases if each in names), MoeConfig)
        yield f'## {method}'
        if base in names:
            yield f'The options of [{names[base]}](#{names[base]}), and:'
        yield from option_table(METHODS[method].config, base)
        presets: dict[str, list[str]] = {}
        for preset, given in METHODS[method].config.PRESETS.items():
            each = ', '.join(f'`{name}={value!r}`' for name, value in given.items())
            presets.setdefault(each or 'the defaults', []).append(f'`preset={preset!r}`')
        yield '\n'.join(f'- {", ".join(names)}: {each}.' for each, names in presets.items())


def configs() -> Iterator[str]:
    for folder in ('classification', 'segmentation', 'comparisons'):
        rows, head = [], 'config, what, total batch, length, data'
        for path in sorted((ROOT / 'configs' / folder).rglob('[!_]*.py')):
            said = re.match(r'(# .*\n)*', path.read_text())
            lines = re.findall('^# (?!From scratch)(.*)', said[0] if said else '', re.MULTILINE)
            what = re.split(r'[:;] ', sentence('\n'.join(lines)))[0].removesuffix('.')
            row = [f'[{path.stem}](../../{path.relative_to(ROOT)})', what]
            if folder != 'comparisons':
                config = load_config(str(path))
                data, loop = config.train_dataloader.dataset, config.train_cfg
                total = config.get('total_batch_size') or config.train_dataloader.batch_size
                length = [f'{loop[n]:,} {n[4:]}' for n in ('max_epochs', 'max_iters') if n in loop]
                row += [total, *length, data.get('data_root') or data.type]
            rows.append(row)
        head = ', '.join(head.split(', ')[: len(rows[0])])
        yield from [f'## {folder.title()}', *table(head, rows)]


def described(parser: Any, name: str) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Of a command, and of each below it: name, description, and arguments with their meaning."""
    rows, below = [], {}
    for action in parser._actions:
        told = [action.help] if action.help else []
        if isinstance(action, argparse._SubParsersAction):
            below = action.choices
        elif action.dest not in ('help', 'debug') and action.help != argparse.SUPPRESS:
            told += [f'One of {", ".join(map(str, action.choices))}.'] if action.choices else []
            told += [f'Default: {action.default}.'] if action.default else []
            names = ', '.join(f'`{each}`' for each in action.option_strings or [action.dest])
            rows.append((names, ' '.join(told)))
    yield name, ' '.join(parser.description.split()), rows
    for sub, own in below.items():
        yield from described(own, f'{name} {sub}')


def command_lines() -> Iterator[str]:
    commands = [each for tool in TOOLS for each in described(parser_of(tool), tool)]
    count = Counter(row for _, _, rows in commands for row in rows)
    shared = {names: told for (names, told), number in count.items() if number > 1}
    yield from ['## Arguments of several commands', *table('argument, meaning', shared.items())]
    for name, description, rows in commands:
        yield from [f'## {name}', description]
        if here := [names for names, told in rows if shared.get(names) == told]:
            yield f'[Shared](#arguments-of-several-commands): {", ".join(here)}.'
        yield from table('argument, meaning', [r for r in rows if shared.get(r[0]) != r[1]])


def models() -> Iterator[str]:
    names, rows = [f'vit_{s}_{m}' for s in SIZES for m in [*METHODS, 'patch16_224']], []
    for name in [*names, 'test_vit_vqmoe', 'test_vit_dense']:
        with torch.device('meta'):
            found = complexity(timm.create_model(name))
        millions = [f'{n / 1e6:.2f}' for n in (found.params, found.active_params)]
        rows.append((f'`{name}`', *millions, f'{found.macs / 1e9:.3f}'))
    return table('model, parameters (M), active (M), GMACs per image', rows)


def public() -> dict[str, Any]:
    """What users import: `__all__` of a package, and what pages import from other modules."""
    text = ''.join(path.read_text() for path in [ROOT / 'README.md', *ROOT.glob('docs/[!a]*/*.md')])
    found = {(m, n) for m, names in IMPORT.findall(text) for n in re.findall(r'\w+', names)}
    for module in (f'vqmoe_vision{name}' for name in PACKAGES):
        found |= {(module, name) for name in importlib.import_module(module).__all__}
    places: dict[int, tuple[str, Any]] = {}  # one that two modules give stands once
    for module, name in sorted(found):
        each = getattr(importlib.import_module(module), name)
        places.setdefault(id(each), (f'{module}.{name}', each))
    return {place: each for place, each in places.values() if callable(each)}


def api() -> Iterator[str]:
    rows = ((f'`{place}`', sentence(each.__doc__)) for place, each in public().items())
    return table('name, what it is', rows)


def pages() -> Iterator[tuple[Path, str]]:
    for make in (api, command_lines, configs, models, options):
        path = ROOT / 'docs/reference' / f'{make.__name__}.md'.replace('_', '-')
        head, below, _ = path.read_text().partition('<!-- written by `make reference` -->')
        yield path, '\n\n'.join(filter(None, [head + below, *make()])) + '\n'


if __name__ == '__main__':
    for path, text in pages():
        path.write_text(text)
