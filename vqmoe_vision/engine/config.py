"""What a config is: by which name, with which options, of which types.

Our tools take our types for stock ones, so that any run goes on to the bit.
"""

import ast
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import DATASETS, Registry
from mmengine.runner import Runner

from vqmoe_vision import config_path

from ..moe.config import check

_PREFIX = 'vqmoe_vision::'  # of configs that come with the package
_PREFIX_OF_MMSEG = 'mmseg::'
# Fields that mmengine's Runner takes from the config without being arguments of its constructor,
# that of sharded.py, that of `share_batch`, and those of tests with --tta.
_EXTRA_FIELDS = {
    'activation_checkpointing', 'compile', 'efficient_conv_bn_eval', 'find_unused_parameters',
    'model_wrapper_cfg', 'parallel', 'runner_type', 'sync_bn', 'total_batch_size', 'tta_model',
    'tta_pipeline',
}  # fmt: skip
# Of these mmengine's Runner reads the named entries, and passes over all others.
_READ = {
    'env_cfg': ('cudnn_benchmark', 'dist_cfg', 'mp_cfg', 'resource_limit'),
    'auto_scale_lr': ('base_batch_size', 'enable'),
}
# Hooks that it adds to every run, and leaves out where a config says None.
_HOOKS = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')
# Ours do what mmengine's, mmcv's and mmseg's of the same options do.
STOCK_LOADING = {'LoadImageFromFile': 'LoadImage', 'LoadAnnotations': 'LoadLabels'}
OURS = {
    'CheckpointHook': 'AtomicCheckpointHook',
    'ClassBalancedDataset': 'SeededClassBalancedDataset',
    'EpochBasedTrainLoop': 'ResumableEpochLoop',
    'RuntimeInfoHook': 'StepValuesHook',
}
_OF_MMSEG = {'IoUMetric': 'CheckedIoUMetric', 'SegDataPreProcessor': 'CheckedPreProcessor'}
_SAMPLERS = {'DefaultSampler': 'SeededSampler', 'InfiniteSampler': 'SeededInfiniteSampler'}
_FIELDS = (
    'default_hooks', 'custom_hooks', 'model', 'train_cfg', 'train_dataloader', 'val_dataloader',
    'test_dataloader', 'val_evaluator', 'test_evaluator',
)  # fmt: skip
# What mmengine adds to a config that does not say it.
_ADDED = {'checkpoint': 'CheckpointHook', 'runtime_info': 'RuntimeInfoHook'}
_SEGMENTATION = 'vqmoe_vision.segmentation'


def find_config(path: str) -> str:
    """The file of a config, which may be one that comes with this package or with mmseg."""
    if path.startswith(_PREFIX):
        return config_path(path.removeprefix(_PREFIX))
    if path.startswith(_PREFIX_OF_MMSEG):
        # mmengine asks for a distribution called mmsegmentation, and onedl's has another name
        origin = getattr(find_spec('mmseg'), 'origin', None)
        allowed = "installed with mmsegmentation: pip install 'vqmoe-vision[seg]'"
        check(origin is not None, 'config', path, allowed)
        folder = Path(str(origin)).parent / '.mim' / 'configs'
        return str(folder / path.removeprefix(_PREFIX_OF_MMSEG))
    return path


def innermost(dataset: ConfigDict) -> list[ConfigDict]:
    """The data sets of a config that are no wrappers of others, in order."""
    found = [dataset.get('dataset'), *(dataset.get('datasets') or [])]
    inside = [each for each in found if isinstance(each, dict)]
    return [each for inner in inside for each in innermost(inner)] if inside else [dataset]


_mmengine_base_path = Config._get_cfg_path


def base_path(base: str, filename: str) -> tuple[str, str | None]:
    """File and scope of a `_base_`, which may also be one that comes with the package."""
    if base.startswith(_PREFIX_OF_MMSEG):
        return find_config(base), 'mmseg'
    named = base.startswith(_PREFIX)
    return (find_config(base), None) if named else _mmengine_base_path(base, filename)


_mmengine_merge = Config._merge_a_into_b


def merge(own: dict, base: dict, *args: bool) -> dict:
    """As mmengine's; a file that states another batch of a process takes no total of its base."""
    if 'total_batch_size' in base and 'total_batch_size' not in own:
        stated, known = (flat(each).get('train_dataloader.batch_size') for each in (own, base))
        if stated not in (None, known):  # a copy of the base's loader states its batch too
            base = {name: value for name, value in base.items() if name != 'total_batch_size'}
    return _mmengine_merge(own, base, *args)


def share_batch(config: Config, processes: int = 1, options: Mapping[str, Any] = {}) -> None:
    """Lets a process take its part of `total_batch_size`, the images of a step of the optimizer."""
    total, loader = config.get('total_batch_size'), config.get('train_dataloader')
    if total is None or loader is None:
        return
    batches = (config.get('optim_wrapper') or {}).get('accumulative_counts', 1)
    valid = type(batches) is int and batches > 0
    check(valid, 'optim_wrapper.accumulative_counts', batches, 'a whole number above 0')
    parts = processes * batches
    allowed = f'a multiple of {parts}, {processes} processes x {batches} batches a step'
    fits = type(total) is int and total > 0 and total % parts == 0
    check(fits, 'total_batch_size', total, allowed)
    stated = (as_arguments(dict(options)).get('train_dataloader') or {}).get('batch_size')
    allowed = f'{total // parts}, or left out, with total_batch_size={total} and {parts} such parts'
    check(stated in (None, total // parts), 'train_dataloader.batch_size', stated, allowed)
    loader.batch_size = total // parts


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """The values of options by dotted name."""
    found = {}
    for option in options:
        name, sign, value = option.partition('=')
        check(bool(sign), '--cfg-options', option, 'written as name=value')
        # mmengine would leave a dictionary as a string
        if value.startswith(('{', '[', '(')) and '{' in value:
            try:
                found[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError, TypeError) as error:
                raise ValueError(f'--cfg-options {option}: write it as in Python') from error
        else:
            found[name] = DictAction._parse_iterable(value)
    return found


def as_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Options as keyword arguments: what has a dotted name is in a dictionary."""
    nested = Config()
    nested.merge_from_dict(options)
    return dict(nested.to_dict())


def merge_options(config: Config, options: dict[str, Any]) -> None:
    """Merges options of the command line into a config; refuses those that nothing would read."""
    fields = (set(inspect.signature(Runner).parameters) | _EXTRA_FIELDS) - {'cfg'}
    hooks = {*(config.get('default_hooks') or {}), *_HOOKS}
    for name, value in options.items():
        first, _, hook = name.partition('.')
        check(first in fields, name, value, f'a field of {", ".join(sorted(fields))}')
        left_out = first == 'default_hooks' and value is None and hook and '.' not in hook
        allowed = f'left out is one of {", ".join(sorted(hooks))}'
        check(not left_out or hook in hooks, name, value, allowed)
    try:
        config.merge_from_dict(options)
        loader = as_arguments(options).get('train_dataloader')
    except (KeyError, TypeError) as error:  # of an element that a list lacks, or of what holds none
        raise ValueError(f'--cfg-options {" ".join(options)}: {error}') from error
    if 'total_batch_size' not in options and 'batch_size' in (loader or {}):
        config.pop('total_batch_size', None)  # what was stated later counts
    share_batch(config)


def check_fields(config: Config) -> None:
    """Refuses what mmengine would pass over in silence; drops other hooks that None leaves out."""
    for field, known in _READ.items():
        for name, value in (config.get(field) or {}).items():
            check(name in known, f'{field}.{name}', value, f'it has {", ".join(known)}')
    hooks = config.get('default_hooks') or {}
    for name in [name for name, hook in hooks.items() if hook is None and name not in _HOOKS]:
        hooks.pop(name)  # of any name but its own six mmengine wants a hook
    for name, value in (config.get('train_cfg') or {}).items():
        if name in ('max_epochs', 'max_iters', 'val_interval'):
            valid = isinstance(value, int | float) and value >= 1 and value % 1 == 0
            check(valid, f'train_cfg.{name}', value, 'a whole number above 0')
    # of a CUDA graph, what is read for the log after some steps would be that of the last replay
    mode = compiled.get('mode') if isinstance(compiled := config.get('compile'), dict) else None
    allowed = "one without CUDA graphs: 'default' or 'max-autotune-no-cudagraphs'"
    check(mode not in ('reduce-overhead', 'max-autotune'), 'compile.mode', mode, allowed)


def check_folders(config: Config, splits: Sequence[str]) -> None:
    """Refuses data sets whose folder is missing, before anything is built."""
    page = 'segmentation.md' if config.get('default_scope') == 'mmseg' else 'data.md'
    for name in (f'{split}_dataloader' for split in splits):
        for dataset in innermost((config.get(name) or {}).get('dataset') or ConfigDict()):
            root = dataset.get('data_root')
            prefixes = (dataset.get('data_prefix') or {}).values()
            elsewhere = dataset.get('backend_args') or any(map(os.path.isabs, prefixes))
            there = not isinstance(root, str) or '://' in root or Path(root).exists()
            if not (there or elsewhere):
                raise ValueError(
                    f'{name}.dataset.data_root={root!r} does not exist: docs/how-to/{page} says '
                    'where to get the data set, and how to lay it out'
                )


def expand(holder: Any) -> None:
    """Puts the user's folder in the place of `~` in all paths of a config, dictionary or list."""
    # in place: a config that is built lazily stays so; a shell does it in some words only
    for key in range(len(holder)) if isinstance(holder, list) else list(holder):
        inner = holder[key]
        if isinstance(inner, dict | list):
            expand(inner)
        elif isinstance(inner, str | Path):
            scheme, colon, path = str(inner).rpartition('local-dir:')
            if (found := os.path.expanduser(path)) != path:
                holder[key] = type(inner)(scheme + colon + found)


def flat(value: Any, name: str = '') -> dict[str, Any]:
    """Values by dotted name."""
    if isinstance(value, list | tuple) and value:
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {name: value}
    named = ((f'{name}.{key}' if name else str(key), inner) for key, inner in value.items())
    return {field: each for own, inner in named for field, each in flat(inner, own).items()}


def take_ours(config: Config) -> str:
    """Puts our types in the place of stock ones, and says which; '' where there were none."""
    names, found = dict(OURS), set[str]()
    if config.get('default_scope') == 'mmseg':
        names |= STOCK_LOADING | _OF_MMSEG
        import_module(f'{_SEGMENTATION}.mmseg_patches').apply()
        # for whoever reads the config of the run
        imports = list((config.get('custom_imports') or {}).get('imports') or [])
        if _SEGMENTATION not in imports:
            config.custom_imports = dict(imports=[*imports, _SEGMENTATION])
    added = {name: dict(type=kind) for name, kind in _ADDED.items()}
    config.default_hooks = {**added, **(config.get('default_hooks') or {})}
    loop = config.get('train_cfg') or {}
    if loop.get('by_epoch') and 'type' not in loop:
        del loop['by_epoch']
        loop['type'] = 'EpochBasedTrainLoop'
    for field in filter(config.get, _FIELDS):
        own = names | (_SAMPLERS if field == 'train_dataloader' else {})
        with DATASETS.switch_scope_and_registry(config.get('default_scope')) as datasets:
            config[field] = renamed(config[field], own, found, datasets)
    own_hooks = config.get('custom_hooks') or []
    every = [*own_hooks, *filter(None, config.default_hooks.values())]
    for hook in every:
        if hook.get('type') == 'EMAHook':  # equal to the bit, so that nothing has to be said
            hook.setdefault('ema_type', 'JointMovingAverage')
    if found and 'ReseedHook' not in [hook.get('type') for hook in every]:
        config.custom_hooks = [*own_hooks, dict(type='ReseedHook')]
    told = ', '.join(f'{(names | _SAMPLERS)[name]} for {name}' for name in sorted(found))
    return f'so that this run goes on to the bit, it has {told}, and ReseedHook' if told else ''


def renamed(
    node: Any, names: Mapping[str, str], found: set[str], datasets: Registry = DATASETS
) -> Any:
    """A part of a config with other types; a data set of ours reads its files as it likes."""
    if isinstance(node, list | tuple):
        return type(node)(renamed(inner, names, found, datasets) for inner in node)
    if not isinstance(node, dict):
        return node
    kind = node.get('type')
    if 'pipeline' in node and any(
        base.__module__.startswith('vqmoe_vision.')
        for base in getattr(datasets.get(kind) if isinstance(kind, str) else kind, '__mro__', ())
    ):
        names = {name: ours for name, ours in names.items() if name not in STOCK_LOADING}
    changed = {name: renamed(inner, names, found, datasets) for name, inner in node.items()}
    plain = re.sub(r'^(mmengine|mmseg)\.', '', kind) if isinstance(kind, str) else ''
    if plain in names:
        found.add(plain)
        changed['type'] = names[plain]
    return type(node)(changed)
