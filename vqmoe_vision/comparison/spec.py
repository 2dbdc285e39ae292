"""What is compared: a config, rows of options, seeds and a budget."""

import json
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.config import find_config, flat, merge_options, parse_options
from vqmoe_vision.models.create import STARTS, create_model, options_in_full
from vqmoe_vision.models.layers import MOE_LAYERS, method_of, resolve_moe_layers
from vqmoe_vision.models.vit_moe import SIZES
from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe.config import check

_METHODS = {  # by row
    'position' if name == 'hashmoe' else name: name
    for name, method in METHODS.items()
    if 'matched' in method.config.PRESETS
}
# Rows that need a dense checkpoint of the same training set, by whose features they decide.
FEATURE_ROWS = tuple(row for row, name in _METHODS.items() if METHODS[name].needs_features)
ROWS = ('dense_1x', 'dense_2x', *(row for row in _METHODS if row not in FEATURE_ROWS))
# Rows that a learned router has to beat: they learn nothing of where tokens go.
CONTROLS = ('position', 'smoe_frozen')
# Method and preset of further rows: the papers' own forms, and what else a method names. Their
# compute may be another.
PRESET_ROWS = {
    f'{row}_{preset}': (name, preset)
    for row, name in _METHODS.items()
    if row not in FEATURE_ROWS
    for kind in [METHODS[name].config]
    for preset in kind.PRESETS
    if kind.from_options(preset=preset) != kind.from_options(preset='matched')
}


def row_options(row: str, size: str | None, model: str = 'model', moe_blocks: int = 2) -> list[str]:
    """The options that make a row of any config; without a size it keeps its model of timm."""
    known = (*ROWS, *FEATURE_ROWS, *PRESET_ROWS)
    check(row in known, 'row', row, f'those that need no options are {known}')
    method, preset = PRESET_ROWS.get(row, (_METHODS.get(row), None))
    num_experts = 4 if size in ('base', 'large') else 8
    fixed = method and 'num_experts' in METHODS[method].config.PRESETS.get(preset or '', {})
    options = {
        'model_name': size and f'vit_{size}_{method or "patch16_224"}',
        'moe': None if method else 'None',
        'extra_mlps': moe_blocks if row == 'dense_2x' else None,
        'moe.method': None if size else method,
        # as the paper: "small, 10M" and "large, 110M"
        'moe.num_experts': num_experts if size and method and not fixed else None,
        'moe.preset': preset,
    }
    return [f'{model}.{name}={value}' for name, value in options.items() if value is not None]


class Backbone:
    """The model of a config with the options of all rows, which rows make others of."""

    def __init__(self, path: str, config: Config, of_all_rows: Sequence[str] = ()) -> None:
        model = config.get('model', {})
        self.field = 'model.backbone' if 'backbone' in model else 'model'
        model, self.where = model.get('backbone', model), f'{path}: {self.field}'
        name, moe = model.get('model_name'), model.get('moe')
        # of a model of timm, which rows keep, there is none
        self.size = name.split('_')[1] if isinstance(name, str) and method_of(name) else None
        valid = isinstance(name, str) and self.size in (None, *SIZES)
        check(valid, f'{self.where}.model_name', name, f'a model, ours of a size of {[*SIZES]}')
        self.dense, self.moe_blocks = self.size is None and moe is None, 2
        if not self.dense:
            own = f'{self.field}.depth'
            given = parse_options([each for each in of_all_rows if each.startswith(f'{own}=')])
            depth = given.get(own, model.get('depth'))
            if not depth and self.size:
                depth = SIZES[self.size]['depth']
            elif not depth:
                with torch.device('meta'):
                    built: Any = create_model(name)
                depth = len(built.blocks)
            check(type(depth) is int and depth > 0, own, depth, 'at least 1')
            self.moe_blocks = len(
                resolve_moe_layers((moe or {}).get('moe_layers', MOE_LAYERS), depth)
            )
        self.started = any(model.get(weights) for weights in STARTS)

    def options(self, row: str) -> list[str]:
        """The options that make a row of it."""
        possible = not self.dense or row in ('dense_1x', 'dense_2x')
        allowed = f'with row {row}, which cannot be made of a dense model; dense_1x can of any'
        check(possible, f'{self.where}.moe', None, allowed)
        return row_options(row, self.size, self.field, self.moe_blocks)


# In an option: the checkpoint of `Comparison.start` at the seed of the run, or with a row behind a
# colon that of this other row.
START = '{start}'
STARTED = '_started'  # how the name of a row ends that is another one from that checkpoint
SOURCE = re.compile(r'\{start(?::([^{}]*))?\}')
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
            check('{start' not in SOURCE.sub('', line), field, line, f"{START} or '{{start:ROW}}'")
            for found in SOURCE.finditer(line):
                check(self.start is not None, field, line, 'it needs the field start')
                if self.start and found[1] is not None:
                    choose(f'{field}: {found[0]}: row', [found[1]], self.start[0].rows)
        given = [each for options in (self.options, *self.rows.values()) for each in options]
        given = [each for each in given if re.match(r'randomness(\.seed)?=', each)]
        check(not given, f'{where}options', given, 'left to seeds, which give each run one')

    def __getstate__(self) -> dict[str, Any]:
        """Its fields: a job that begins later reads the config of then."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

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


# Fields that a run without start goes by, beside its row.
_OF_A_RUN = ('config', 'seeds', 'metric', 'also', 'options', 'shifts', 'stage')
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
    if wrong := sorted((given.keys() - _FIELDS) | ({'config', 'seeds', 'metric'} - given.keys())):
        raise ValueError(f'{path}: fields {wrong} are missing or not known; known: {[*_FIELDS]}')
    for name, value in given.items():
        check(isinstance(value, kind := _FIELDS[name]), f'{path}: {name}', value, f'of {kind}')
    base = load_config(given['config'], import_modules=False)
    backbone = Backbone(given['config'], base, given.get('options', ()))
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
    given['rows'] = {}
    for row, line in (rows | own).items():
        words = words_of(f'rows.{row}', line)
        if words and '=' not in words[0]:
            words[:1] = backbone.options(words[0])
        given['rows'][row] = words
    given.setdefault('reference', next(iter(given['rows']), ''))
    if 'start' in given:
        words = given['start'].split()
        check(len(words) == 3, f'{path}: start', given['start'], "'COMPARISON ROW CHECKPOINT'")
    fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
    if 'start' in given:
        start_file = Path(find_config(words[0]))
        if (
            start_file.resolve() == Path(path).resolve()
        ):  # a row of its own that starts from nothing
            alone = {n: v for n, v in fields.items() if n in _OF_A_RUN}
            alone['rows'] = {r: o for r, o in given['rows'].items() if '{start' not in str(o)}
            alone['reference'] = next(iter(alone['rows']), '')
            source = Comparison(Path(path).stem, **alone)
        else:
            source = read_comparison(words[0], (*within, path))
        choose(f'{path}: start: row', [words[1]], source.rows)
        fields['start'] = source, *words[1:]
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
    backbone = Backbone(path, config)
    metric = config.get('default_hooks', {}).get('checkpoint', {}).get('save_best')
    valid = isinstance(metric, str) and metric != 'auto'
    check(valid, f'{path}: default_hooks.checkpoint.save_best', metric, 'the name of a metric')
    rows = {row: backbone.options(row) for row in dict.fromkeys((*ROWS, *CONTROLS))}
    if backbone.started:
        del rows['dense_2x']
    contrasts = ('smoe - smoe_frozen', 'vqmoe - smoe', 'vqmoe - dense_2x')
    return Comparison(
        name,
        path,
        rows,
        (1, 2, 3, 4, 5),
        'dense_1x',
        metric,
        also=('aAcc', 'mAcc') if metric == 'mIoU' else (),  # as the paper's table of ADE20K
        contrasts=tuple(c for c in contrasts if rows.keys() >= {*pair_of(c)}),
    )


def choose(field: str, wanted: Sequence[Any] | None, known: Collection[Any]) -> list[Any]:
    """What was asked for, each once; all there is if that is None."""
    for name in wanted or ():
        if name not in known:
            there = ', '.join(map(str, known))
            raise ValueError(f'{field} {name} does not exist; there are {there}')
    return list(known if wanted is None else dict.fromkeys(wanted))


# Of a config: what keeps, logs and draws a run, finds its types, or is of tests with --tta, which
# no row has; and the pipelines of mmseg's configs, which their data sets repeat.
_LEFT_OUT = {
    'custom_imports', 'default_scope', 'env_cfg', 'launcher', 'log_level', 'log_processor',
    'resume', 'test_pipeline', 'total_batch_size', 'train_pipeline', 'tta_model', 'tta_pipeline',
    'vis_backends', 'visualizer', 'work_dir',
}  # fmt: skip
_KEEPING = {  # default hooks
    'checkpoint', 'logger', 'record', 'routing_history', 'routing_picture', 'runtime_info',
    'visualization',
}  # fmt: skip
# Options that came later, by the value with which nothing changes.
_ADDED: dict[str, Any] = {
    'moe.recompute': None,
    'moe.score': 'softmax',
    'moe.num_shared_experts': 0,
    'moe.code_dim': 24,
    'moe.router_drop': 0,
}


def recipe_of(config: Mapping[str, Any], sources: Mapping[str, str] = {}) -> str:
    """16 digits of the sha256 of a resolved config.

    Args:
        config: As JSON has it.
        sources: What stands for checkpoints of other runs, by the ends of their paths.
    """
    return sha256(json.dumps(canonical(config, sources), sort_keys=True).encode()).hexdigest()[:16]


def canonical(config: Mapping[str, Any], sources: Mapping[str, str] = {}) -> dict[str, Any]:
    """All that decides what a run gives, by dotted name."""
    counting = {name: value for name, value in config.items() if name not in _LEFT_OUT}
    hooks, drawn = config.get('default_hooks', {}), config.get('randomness', {})
    counting |= {
        'default_hooks': {n: hook for n, hook in hooks.items() if n not in _KEEPING},
        # by their types: where one stands among the others is no matter
        'custom_hooks': {hook['type']: hook for hook in config.get('custom_hooks') or ()},
        'randomness': {n: v for n, v in drawn.items() if n != 'seed'},
    }
    moe = options_in_full(config['model'].get('backbone', config['model']))
    # defaults and presets included; where MoE layers stand is none of the options in full
    given = rf'.*\.moe\.({"|".join([*moe, "preset"])})(\..*)?'
    found = {n: value for n, value in flat(counting).items() if not re.fullmatch(given, n)}
    found |= flat({'moe': moe})
    plain = {n: _plain(value, sources) for n, value in found.items() if value not in ({}, [])}
    return {n: v for n, v in plain.items() if (n, v) not in _ADDED.items()}


def _plain(value: Any, sources: Mapping[str, str]) -> Any:
    """As JSON has it; 1.0 is 1, and the run behind a checkpoint stands for its path."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    return next((run for end, run in sources.items() if f'/{value}'.endswith(f'/{end}')), value)
