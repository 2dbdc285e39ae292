"""What is compared: a config, rows of options, seeds and a budget."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmengine.config import Config

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.config import find_config
from vqmoe_vision.moe.config import check

from .rows import CONTROLS, FEATURE_ROWS, PRESET_ROWS, ROWS, Backbone, backbone_of

# In an option: the checkpoint of `Comparison.start` at the seed of the run, or with a row behind a
# colon that of this other row.
START = '{start}'
# How the name of a row ends that is another one from that checkpoint.
STARTED = '_started'
_LARGEST_SEED = 2**32 - 1  # which numpy takes
# What the numbers of a comparison are of. Choices are made on what no final table uses.
STAGES = ('test', 'dev')
STARTS = re.compile(r'\{start(?::([^{}]*))?\}')
# Fields of a file that stand for many rows, with what each row is.
_ROWS = {
    'all_methods': {
        **{row: row for row in ROWS},
        **{row: f'{row} MODEL.features={START}' for row in FEATURE_ROWS},
    },
    'all_presets': {row: row for row in PRESET_ROWS},
    'all_started': {
        f'{row}{STARTED}': f'{row} MODEL.checkpoint={START}'
        for row in (*ROWS, *FEATURE_ROWS)
        if row != 'dense_2x'
    },  # a dense model of another width is no start
}

# What the fields of a file are: texts, lists of texts, and texts by name.
_TEXTS = {'config', 'metric', 'reference', 'stage', 'start'}
_LISTS = {'also', 'contrasts', 'highlighted', 'options', 'seeds'}
_BY_NAME = {'images', 'rows', 'shifts'}
# What tables of a config show beside its metric, as the paper's table of ADE20K does.
_ALSO = {'mIoU': ('aAcc', 'mAcc')}
# What such a comparison asks first.
_CONTRASTS = ('smoe - smoe_frozen', 'vqmoe - smoe', 'vqmoe - dense_2x')


@dataclass(frozen=True)
class Start:
    """The run that rows start from, at their own seed."""

    comparison: Comparison
    row: str
    file: str  # checkpoint in its work dir


@dataclass(frozen=True)
class Comparison:
    """A comparison, as a file in `configs/comparisons` gives it."""

    name: str
    config: str
    rows: dict[str, list[str]]  # options
    seeds: tuple[int, ...]
    reference: str  # row that the others are compared with
    metric: str
    also: tuple[str, ...] = ()  # further numbers: names, or what stands after a layer's name
    options: tuple[str, ...] = ()  # of all rows
    contrasts: tuple[str, ...] = ()  # 'ROW - OTHER', which p is corrected for
    margin: float | None = None  # within which two rows are called equal
    start: Start | None = None  # what rows start from that say `{start}`
    shifts: dict[str, str] = field(default_factory=dict)  # options of further tests
    images: dict[str, str] = field(default_factory=dict)  # names in documents, by figure
    highlighted: tuple[str, ...] = ()  # rows whose curves have colours; all if none is named
    stage: str = 'test'  # or 'dev', where nothing is tested

    def __post_init__(self) -> None:
        where = f'comparison {self.name}: '
        for name in ('seeds', 'rows'):
            if not getattr(self, name):
                raise ValueError(f'comparison {self.name}: {name} is empty')
        allowed = f'whole numbers from 0 to {_LARGEST_SEED}'
        valid = all(type(n) is int and 0 <= n <= _LARGEST_SEED for n in self.seeds)
        check(valid, f'{where}seeds', self.seeds, allowed)
        if twice := sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            raise ValueError(f'comparison {self.name}: seeds {twice} are there twice')
        if self.metric in self.also:
            raise ValueError(
                f'comparison {self.name}: also={self.metric!r} is the metric, which the table has'
            )
        check(self.stage in STAGES, f'{where}stage', self.stage, f'one of {STAGES}')
        allowed = "none with stage='dev', which tests nothing"
        check(self.tested or not self.shifts, f'{where}shifts', self.shifts, allowed)
        named = [row for contrast in self.contrasts for row in pair_of(contrast)]
        for row in (self.reference, *self.highlighted, *named):
            choose(f'comparison {self.name}: row', [row], self.rows)
        if self.margin is not None:
            check(self.margin > 0, f'{where}margin', self.margin, 'above 0')
        for option in self.options:
            check('{start' not in option, f'{where}options', option, f'{START} in rows alone')
            _check_no_seed(f'{where}options', option)
        for row, options in self.rows.items():
            allowed = 'a name that a file can have'
            check(Path(row).name == row and '\0' not in row, f'{where}row', row, allowed)
            self._check_starts(row, ' '.join(options))
            for option in options:
                _check_no_seed(f'{where}rows.{row}', option)

    def _check_starts(self, row: str, line: str) -> None:
        for found in STARTS.finditer(line):
            if self.start is None:
                raise ValueError(f'comparison {self.name}: row {row} needs the field start')
            other = self.start.row if found[1] is None else found[1]
            choose(f'comparison {self.name}: {found[0]}: row', [other], self.start.comparison.rows)
        left = '{start' not in STARTS.sub('', line)
        check(left, f'comparison {self.name}: rows.{row}', line, f"{START} or '{{start:ROW}}'")

    @property
    def tested(self) -> bool:
        """Whether its runs see test data, once, at their end."""
        return self.stage == 'test'

    @cached_property
    def base(self) -> Config:
        """The config without options, whose modules are not imported; to be copied."""
        return load_config(self.config, import_modules=False)

    def selected(
        self, rows: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> list[tuple[str, int]]:
        """Rows by seeds, a seed of all rows before the next: the first pairs come first."""
        rows = choose('--rows', rows, self.rows)
        seeds = choose('--seeds', seeds, self.seeds)
        return [(row, seed) for seed in seeds for row in rows]


def _check_no_seed(field: str, option: str) -> None:
    ours = option.partition('=')[0] not in ('randomness', 'randomness.seed')
    check(ours, field, option, 'left to seeds, which give each run its own')


def read_comparison(path: str, within: tuple[str, ...] = ()) -> Comparison:
    """Reads a comparison, or a config that trains: `ROWS` and `CONTROLS` at five seeds."""
    path = find_config(path)
    check(path not in within, f'{path}: start', path, 'a comparison that does not start from it')
    name = Path(path).stem
    try:
        given = Config.fromfile(path, import_custom_modules=False).to_dict()
    except SyntaxError as error:
        raise ValueError(f'{path}, line {error.lineno}: {error.msg}') from error
    if 'model' in given:
        return _of_config(path)
    _check_fields(path, given)
    config = given.pop('config')
    base = load_config(config, import_modules=False)
    backbone = backbone_of(config, base, given.get('options', ()))
    rows = {
        row: line.replace('MODEL', backbone.field)
        for field, lines in _ROWS.items()
        if given.pop(field, False)
        for row, line in lines.items()
        if 'start' in given or row not in FEATURE_ROWS
    }
    own = given.pop('rows', {})
    if other := sorted(row for row in rows.keys() & own.keys() if rows[row] != own[row]):
        raise ValueError(f'{path}: rows {other} stand for others by all_methods or all_presets')
    rows |= own
    return Comparison(
        name=name,
        config=config,
        rows={row: _options(row, line, backbone) for row, line in rows.items()},
        seeds=tuple(given['seeds']),
        reference=given.get('reference', next(iter(rows), '')),
        metric=given['metric'],
        also=tuple(given.get('also', ())),
        options=tuple(given.get('options', ())),
        contrasts=tuple(given.get('contrasts', ())),
        margin=given.get('margin'),
        start=_start(path, given['start'], within) if 'start' in given else None,
        shifts=given.get('shifts', {}),
        images=given.get('images', {}),
        highlighted=tuple(given.get('highlighted', ())),
        stage=given.get('stage', 'test'),
    )


def _check_fields(path: str, given: dict[str, Any]) -> None:
    known = _TEXTS | _LISTS | _BY_NAME | _ROWS.keys() | {'margin'}
    if wrong := sorted((given.keys() - known) | ({'config', 'seeds', 'metric'} - given.keys())):
        raise ValueError(f'{path}: fields {wrong} are missing or not known; known: {sorted(known)}')
    for name, value in given.items():
        where = f'{path}: {name}'
        if name in _TEXTS:
            check(isinstance(value, str), where, value, 'a text')
        elif name == 'margin':
            check(isinstance(value, int | float), where, value, 'a number')
        elif name in _ROWS:
            check(isinstance(value, bool), where, value, 'True or False')
        elif name in _BY_NAME:
            valid = isinstance(value, dict) and all(map(_is_text, [*value, *value.values()]))
            check(valid, where, value, f"texts by name, {name} = dict(NAME='TEXT')")
        else:
            valid = isinstance(value, Sequence) and not isinstance(value, str)
            check(valid, where, value, 'a list')
            check(name == 'seeds' or all(map(_is_text, value)), where, value, 'a list of texts')


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def pair_of(contrast: str) -> tuple[str, str]:
    """The rows of 'ROW - OTHER'."""
    words = contrast.split(' - ')
    check(len(words) == 2, 'contrasts', contrast, "'ROW - OTHER'")
    return words[0], words[1]


def starts(options: Sequence[str]) -> bool:
    """Whether a row with these options starts from the run of another comparison."""
    return STARTS.search(' '.join(options)) is not None


def words_of(field: str, line: str) -> list[str]:
    """What a shell makes of a line of options."""
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ValueError(f'{field}={line!r} is not possible: {error}') from error


def _start(path: str, line: str, within: tuple[str, ...]) -> Start:
    words = line.split()
    if len(words) != 3:
        raise ValueError(f"{path}: start={line!r} must be 'COMPARISON ROW CHECKPOINT'")
    comparison = read_comparison(words[0], (*within, path))
    choose(f'{path}: start: row', [words[1]], comparison.rows)
    return Start(comparison, words[1], words[2])


def _of_config(path: str) -> Comparison:
    # with its folder: a comparison of the same stem has rows and tables of its own
    name = f'{Path(path).absolute().parent.name}-{Path(path).stem}'
    config = load_config(path, import_modules=False)
    backbone = backbone_of(path, config)
    metric = config.get('default_hooks', {}).get('checkpoint', {}).get('save_best')
    if not isinstance(metric, str) or metric == 'auto':
        raise ValueError(f'{path}: default_hooks.checkpoint.save_best does not name a metric')
    rows = {row: backbone.options(row) for row in dict.fromkeys((*ROWS, *CONTROLS))}
    if backbone.started:
        del rows['dense_2x']
    also = _ALSO.get(metric, ())
    seeds = 1, 2, 3, 4, 5
    contrasts = tuple(c for c in _CONTRASTS if rows.keys() >= {*pair_of(c)})
    return Comparison(name, path, rows, seeds, 'dense_1x', metric, also, contrasts=contrasts)


def _options(row: str, line: str, backbone: Backbone) -> list[str]:
    words = words_of(f'rows.{row}', line)
    if words and '=' not in words[0]:
        return [*backbone.options(words[0]), *words[1:]]
    return words


def choose(field: str, wanted: Sequence[Any] | None, known: Iterable[Any]) -> list[Any]:
    """What was asked for, each once."""
    if wanted is None:
        return list(known)
    for name in wanted:
        if name not in known:
            raise ValueError(
                f'{field} {name} does not exist; there are {", ".join(map(str, known))}'
            )
    return list(dict.fromkeys(wanted))
