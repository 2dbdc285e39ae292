"""Stock types of a config, for which our tools take ours: then any run goes on to the bit."""

from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, Registry

# Ours do what mmengine's, mmcv's and mmseg's of the same options do.
LOADING = {'LoadImageFromFile': 'LoadImage', 'LoadAnnotations': 'LoadLabels'}
OURS = {
    'CheckpointHook': 'AtomicCheckpointHook',
    'ClassBalancedDataset': 'SeededClassBalancedDataset',
    'EpochBasedTrainLoop': 'ResumableEpochLoop',
    'RuntimeInfoHook': 'StepValuesHook',
}
_OF_MMSEG = {'IoUMetric': 'CheckedIoUMetric', 'SegDataPreProcessor': 'CheckedPreProcessor'}
_SAMPLERS = {'DefaultSampler': 'SeededSampler', 'InfiniteSampler': 'SeededInfiniteSampler'}
_FIELDS = ('default_hooks', 'train_cfg', 'train_dataloader', 'val_dataloader', 'test_dataloader')
_FIELDS += ('model', 'val_evaluator', 'test_evaluator')
# What mmengine adds to a config that does not say it.
_ADDED = {'checkpoint': 'CheckpointHook', 'runtime_info': 'RuntimeInfoHook'}
_SEGMENTATION = 'vqmoe_vision.segmentation'


def take_ours(config: Config) -> str:
    """Puts our types in the place of stock ones, and says which; '' where there were none."""
    names, found = dict(OURS), set[str]()
    if config.get('default_scope') == 'mmseg':
        names |= LOADING | _OF_MMSEG
        import_module(f'{_SEGMENTATION}.mmseg_patches').apply()
        # for whoever reads the config of the run
        imports = list((config.get('custom_imports') or {}).get('imports') or [])
        if _SEGMENTATION not in imports:
            config.custom_imports = dict(imports=[*imports, _SEGMENTATION])
    hooks = config.get('default_hooks') or {}
    config.default_hooks = {**{n: dict(type=kind) for n, kind in _ADDED.items()}, **hooks}
    loop = config.get('train_cfg') or {}
    if loop.get('by_epoch') and 'type' not in loop:
        del loop['by_epoch']
        loop['type'] = 'EpochBasedTrainLoop'
    for field in _FIELDS:
        if config.get(field) is not None:
            own = names | (_SAMPLERS if field == 'train_dataloader' else {})
            with DATASETS.switch_scope_and_registry(config.get('default_scope')) as datasets:
                config[field] = renamed(config[field], own, found, datasets)
    told = [f'{(names | _SAMPLERS)[name]} for {name}' for name in sorted(found)]
    every = [*(config.get('custom_hooks') or []), *config.default_hooks.values()]
    if found and not any(hook and hook.get('type') == 'ReseedHook' for hook in every):
        config.custom_hooks = [*(config.get('custom_hooks') or []), dict(type='ReseedHook')]
        told.append('ReseedHook')
    return f'so that this run goes on to the bit, it has {", ".join(told)}' if told else ''


def renamed(
    node: Any, names: Mapping[str, str], found: set[str], datasets: Registry = DATASETS
) -> Any:
    """A part of a config with other types; a data set of ours reads its files as it likes."""
    if isinstance(node, list | tuple):
        return type(node)(renamed(inner, names, found, datasets) for inner in node)
    if not isinstance(node, dict):
        return node
    kind = node.get('type')
    if 'pipeline' in node and _is_ours(datasets.get(kind) if isinstance(kind, str) else kind):
        names = {name: ours for name, ours in names.items() if name not in LOADING}
    changed = {name: renamed(inner, names, found, datasets) for name, inner in node.items()}
    if isinstance(kind, str) and kind in names:
        found.add(kind)
        changed['type'] = names[kind]
    return type(node)(changed)


def _is_ours(kind: Any) -> bool:
    bases: Collection[type] = getattr(kind, '__mro__', ())
    return any(base.__module__.startswith('vqmoe_vision.') for base in bases)
