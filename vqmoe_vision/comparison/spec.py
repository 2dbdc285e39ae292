"""What is compared: a config, rows of options, seeds and a budget."""

import re
import shlex
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmengine.config import Config

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.config import find_config, merge_options, parse_options
from vqmoe_vision.moe.config import check

from .rows import CONTROLS, FEATURE_ROWS, PRESET_ROWS, ROWS, Backbone, backbone_of

# In an option: the checkpoint of `Comparison.start` at the seed of the run, or with a row behind a
# colon that of this other row.
START = '{start}'
# How the name of a row ends that is another one from that checkpoint.
STARTED = '_started'
STARTS = re.compile(r'\{start(?::([^{}]*))?\}')
_SEED = re.compile(r'randomness(\.seed)?=')
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
# What the comparison of a config asks first.
_CONTRASTS = ('smoe - smoe_frozen', 'vqmoe - smoe', 'vqmoe - dense_2x')


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
    # comparison, row and checkpoint in its work dir: what rows start from, at their own seed
    start: tuple['Comparison', str, str] | None = None
    shifts: dict[str, str] = field(default_factory=dict)  # options of further tests
    images: dict[str, str] = field(default_factory=dict)  # names in documents, by figure
    highlighted: tuple[str, ...] = ()  # rows whose curves have colours; all if none is named
    stage: str = 'test'  # or 'dev', where nothing is tested

    def __post_init__(self) -> None:
        where = f'comparison {self.name}: '
        check(bool(self.rows), f'{where}rows', self.rows, 'not empty')
        valid = all(type(n) is int and 0 <= n < 2**32 for n in self.seeds)  # as numpy takes them
        valid = valid and 0 < len(self.seeds) == len({*self.seeds})
        allowed = 'different whole numbers from 0 to 4294967295'
        check(valid, f'{where}seeds', self.seeds, allowed)
        check(self.stage in ('test', 'dev'), f'{where}stage', self.stage, "'test' or 'dev'")
        allowed = "none with stage='dev', which tests nothing"
        check(self.tested or not self.shifts, f'{where}shifts', self.shifts, allowed)
        check(self.margin is None or self.margin > 0, f'{where}margin', self.margin, 'above 0')
        named = [row for contrast in self.contrasts for row in pair_of(contrast)]
        choose(f'{where}row', [self.reference, *self.highlighted, *named], self.rows)
        allowed = f'{START} in rows alone'
        check('{start' not in ' '.join(self.options), f'{where}options', self.options, allowed)
        for row, options in self.rows.items():
            allowed = 'a name that a file can have'
            check(Path(row).name == row and '\0' not in row, f'{where}row', row, allowed)
            field, line = f'{where}rows.{row}', ' '.join(options)
            check('{start' not in STARTS.sub('', line), field, line, f"{START} or '{{start:ROW}}'")
            for found in STARTS.finditer(line):
                check(self.start is not None, field, line, 'it needs the field start')
                own = [] if found[1] is None else [found[1]]
                choose(f'{field}: {found[0]}: row', own, self.start[0].rows if self.start else ())
            seeds = [each for each in (*self.options, *options) if _SEED.match(each)]
            check(not seeds, field, seeds, 'left to seeds, which give each run one')

    @property
    def tested(self) -> bool:
        """Whether its runs see test data, once, at their end."""
        return self.stage == 'test'

    @cached_property
    def base(self) -> Config:
        """The config without options, to be copied."""
        return load_config(self.config, import_modules=False)

    def merged(self, options: Sequence[str]) -> Config:
        """The config with options, whose modules are not imported."""
        config = deepcopy(self.base)
        merge_options(config, parse_options(options))
        return config

    def selected(
        self, rows: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> list[tuple[str, int]]:
        """Rows by seeds, a seed of all rows before the next: the first pairs come first."""
        rows = choose('--rows', rows, self.rows)
        seeds = choose('--seeds', seeds, self.seeds)
        return [(row, seed) for seed in seeds for row in rows]


# What the fields of a file are.
_FIELDS: dict[str, Any] = {
    **dict.fromkeys(('config', 'metric', 'reference', 'stage', 'start'), str),
    **dict.fromkeys(('also', 'contrasts', 'highlighted', 'options', 'seeds'), (list, tuple)),
    **dict.fromkeys(('images', 'rows', 'shifts'), dict),
    **dict.fromkeys(_ROWS, bool),
    'margin': (int, float),
}


def read_comparison(path: str, within: tuple[str, ...] = ()) -> Comparison:
    """Reads a comparison, or a config that trains: `ROWS` and `CONTROLS` at five seeds."""
    path = find_config(path)
    check(path not in within, f'{path}: start', path, 'a comparison that does not start from it')
    try:
        given = Config.fromfile(path, import_custom_modules=False).to_dict()
    except SyntaxError as error:
        raise ValueError(f'{path}, line {error.lineno}: {error.msg}') from error
    if 'model' in given:
        return _of_config(path)
    needed = {'config', 'seeds', 'metric'}
    if wrong := sorted((given.keys() - _FIELDS) | (needed - given.keys())):
        raise ValueError(f'{path}: fields {wrong} are missing or not known; known: {[*_FIELDS]}')
    for name, value in given.items():
        check(isinstance(value, kind := _FIELDS[name]), f'{path}: {name}', value, f'of {kind}')
    base = load_config(given['config'], import_modules=False)
    backbone = backbone_of(given['config'], base, given.get('options', ()))
    rows = {
        row: line.replace('MODEL', backbone.field)
        for of_field, lines in _ROWS.items()
        if given.pop(of_field, False)
        for row, line in lines.items()
        if 'start' in given or row not in FEATURE_ROWS
    }
    own = given.pop('rows', {})
    if other := sorted(row for row in rows.keys() & own.keys() if rows[row] != own[row]):
        raise ValueError(f'{path}: rows {other} stand for others by all_methods or all_presets')
    given['rows'] = {r: _options(r, line, backbone) for r, line in (rows | own).items()}
    given.setdefault('reference', next(iter(given['rows']), ''))
    if 'start' in given:
        words = given['start'].split()
        check(len(words) == 3, f'{path}: start', given['start'], "'COMPARISON ROW CHECKPOINT'")
        source = read_comparison(words[0], (*within, path))
        choose(f'{path}: start: row', [words[1]], source.rows)
        given['start'] = source, *words[1:]
    fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
    return Comparison(Path(path).stem, **fields)


def pair_of(contrast: str) -> tuple[str, str]:
    """The rows of 'ROW - OTHER'."""
    words = contrast.split(' - ')
    check(len(words) == 2, 'contrasts', contrast, "'ROW - OTHER'")
    return words[0], words[1]


def words_of(field: str, line: str) -> list[str]:
    """What a shell makes of a line of options."""
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ValueError(f'{field}={line!r} is not possible: {error}') from error


def _of_config(path: str) -> Comparison:
    # with its folder: a comparison of the same stem has rows and tables of its own
    name = f'{Path(path).absolute().parent.name}-{Path(path).stem}'
    config = load_config(path, import_modules=False)
    backbone = backbone_of(path, config)
    metric = config.get('default_hooks', {}).get('checkpoint', {}).get('save_best')
    valid = isinstance(metric, str) and metric != 'auto'
    check(valid, f'{path}: default_hooks.checkpoint.save_best', metric, 'the name of a metric')
    rows = {row: backbone.options(row) for row in dict.fromkeys((*ROWS, *CONTROLS))}
    if backbone.started:
        del rows['dense_2x']
    # as the paper's table of ADE20K
    also, seeds = ('aAcc', 'mAcc') if metric == 'mIoU' else (), (1, 2, 3, 4, 5)
    contrasts = tuple(c for c in _CONTRASTS if rows.keys() >= {*pair_of(c)})
    return Comparison(name, path, rows, seeds, 'dense_1x', metric, also, contrasts=contrasts)


def _options(row: str, line: str, backbone: Backbone) -> list[str]:
    words = words_of(f'rows.{row}', line)
    if words and '=' not in words[0]:
        return [*backbone.options(words[0]), *words[1:]]
    return words


def choose(field: str, wanted: Sequence[Any] | None, known: Collection[Any]) -> list[Any]:
    """What was asked for, each once; all there is if that is None."""
    for name in wanted or ():
        if name not in known:
            there = ', '.join(map(str, known))
            raise ValueError(f'{field} {name} does not exist; there are {there}')
    return list(known if wanted is None else dict.fromkeys(wanted))
