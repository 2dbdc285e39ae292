"""What this version of the package does, seen from outside: through names that no cut may change.

timm's names, exported functions, registered types, files of configs and programs; no module that is
the package's own business. It imports nothing of the tests, so that `compare.py` can run it with an
older version.
"""

import argparse
import json
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqmoe_vision import collect_losses, update_state
from vqmoe_vision.moe import METHODS, start_training

# 16 tokens of 12 numbers, and two layers of 4 experts
SIZES: dict[str, Any] = {'img_size': 16, 'patch_size': 4, 'embed_dim': 12, 'depth': 2}
SIZES |= {'num_heads': 3, 'num_experts': 4, 'moe_layers': (0, 1)}
NUM_CLASSES = 5
STEPS = 3
ROOT = Path(__file__).parents[2]
IGNORED = 255  # a label that no head learns from

EMA = {'preset': 'ema'}  # VQMoE's default until December 2026
# Options beside the presets that run other code and stay.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    'smoe-switch': ('smoe', {'top_k': 1, 'balance_weight': 0.1, 'z_weight': 0.1}),
    'smoe-capacity': ('smoe', {'capacity_factor': 1.0, 'batch_prioritized': True}),
    'smoe-eval-capacity': ('smoe', {'eval_capacity_factor': 1.0}),
    'xmoe-sigmoid': ('xmoe', {'gate': 'sigmoid', 'balance_temperature': 0.5}),
    'stablemoe-short': ('stablemoe', {'stage1_steps': 1, 'distill_weight': 0.5}),
    'softmoe-slots': ('softmoe', {'slots_per_expert': 3, 'init_scale': 8.0}),
    'vqmoe-discrete': (
        'vqmoe',
        {**EMA, 'form': 'discrete', 'code_share': 0.3, 'use_cosine_sim': True},
    ),
    'vqmoe-continuous': ('vqmoe', {'form': 'continuous', 'routed_scaling_factor': 2.75}),
    'vqmoe-codes': (
        'vqmoe',
        {**EMA, 'num_codes': 48, 'ema_decay': 0.9, 'dead_code_threshold': 0.5},
    ),
    'vqmoe-simvq': (
        'vqmoe',
        {**EMA, 'codebook': 'simvq', 'expert_input': 'ste', 'rotation_trick': True},
    ),
    'vqmoe-cvq': (
        'vqmoe',
        {**EMA, 'codebook': 'cvq', 'expert_input': 'token', 'diversity_weight': 0.1},
    ),
    'ecmoe-one': ('ecmoe', {'capacity_factor': 1.0}),
    'mocle-soft': ('mocle', {'num_clusters': 8, 'temperature': 1.0, 'router_noise': 0.0}),
}


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Method and options by name: every preset of every method, and `OPTIONS`."""
    presets = {
        # few are chosen where a preset has experts of a number of its own
        f'{name}-{preset}': (name, {'preset': preset, **({'top_k': 2} if own else {})})
        for name, method in METHODS.items()
        for preset, options in method.config.PRESETS.items()
        for own in ['num_experts' in options]
    }
    return presets | OPTIONS


def waves(number: int, size: int) -> Tensor:
    """Images (number, 3, size, size) float64 by a formula, each with waves of its own."""
    image, channel, y, x = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in (number, 3, size, size)), indexing='ij'
    )
    across = ((0.2 + 0.07 * image) * x + channel).sin()
    return across + ((0.3 + 0.05 * image) * y - 2 * channel + 0.05 * x * y).cos()


def create(method: str, **options: Any) -> nn.Module:
    """A tiny model at seed 0, in the default dtype."""
    torch.manual_seed(0)
    options = {**SIZES, 'num_classes': NUM_CLASSES, **options}
    return timm.create_model(f'vit_tiny_{method}', **options)


def segmentor(method: str, **options: Any) -> nn.Module:
    """A tiny Segmenter at seed 0, in the default dtype."""
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS

    import vqmoe_vision.segmentation  # noqa: F401  registers it

    backbone = {'type': 'TimmViT', 'model_name': f'vit_tiny_{method}', **SIZES, **options}
    head = dict(type='SegmenterMaskTransformerHead', num_classes=NUM_CLASSES, num_layers=1)
    head |= dict(num_heads=2, dropout_ratio=0.0, drop_path_rate=0.0)
    head |= dict.fromkeys(('in_channels', 'channels', 'embed_dims'), backbone['embed_dim'])
    test = dict(mode='whole')
    config = dict(type='MoeEncoderDecoder', backbone=backbone, decode_head=head, test_cfg=test)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        return MODELS.build(config)


def enlarge(model: nn.Module) -> None:
    """As if trained: at the start of a ViT the answers of experts are next to nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)


def classify(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Losses by name; the loss of the task comes first."""
    targets = torch.arange(len(images)) % NUM_CLASSES
    with collect_losses(model) as collected:
        task = F.cross_entropy(model(images), targets)
        return {'task': task, **collected.losses}


def segment(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Losses by name, as the segmentor gives them to mmengine's loop."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    size = images.shape[-1]
    samples = []
    for i in range(len(images)):
        labels = (torch.arange(size)[:, None] * (i + 1) + torch.arange(size)) // 7 % NUM_CLASSES
        labels[0] = IGNORED
        sample = SegDataSample(metainfo={'img_shape': (size, size), 'ori_shape': (size, size)})
        sample.set_data({'gt_sem_seg': PixelData(data=labels[None])})
        samples.append(sample)
    losses: dict[str, Tensor] = model.loss(images, samples)
    return {name: value for name, value in losses.items() if 'loss' in name}


def train(model: nn.Module, losses_of: Callable, images: Tensor) -> Iterator[dict[str, Tensor]]:
    """`STEPS` steps; gives the losses of each, with their gradients still in the model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    start_training(model, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses = losses_of(model, images)
        sum(losses.values()).backward()
        if losses_of is segment:  # the segmentor leaves it to a hook
            update_state(model)
        yield {name: value.detach() for name, value in losses.items()}
        optimizer.step()


def entry_points() -> list[str]:
    """The models that the package registers with timm."""
    ends = tuple(f'_{method}' for method in METHODS)
    return [name for name in timm.list_models() if name.endswith((*ends, 'test_vit_dense'))]


def shapes(model: nn.Module) -> list[list[Any]]:
    """Name, shape and dtype of each entry of a state dict."""
    state = sorted(model.state_dict().items())
    return [[name, list(v.shape), str(v.dtype).removeprefix('torch.')] for name, v in state]


def differences(found: Mapping, recorded: Mapping, place: str = '') -> Iterator[str]:
    """A line for each value that is not as it was."""
    for name in sorted(found.keys() | recorded.keys()):
        if name not in found or name not in recorded:
            yield f'{place}{name}: is {"new" if name in found else "gone"}'
            continue
        ours, theirs = found[name], recorded[name]
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from differences(ours, theirs, f'{place}{name}: ')
        elif isinstance(ours, Tensor) and isinstance(theirs, Tensor):
            if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype) or not ours.equal(theirs):
                yield f'{place}{name}: other numbers, shape or type'
        elif ours != theirs:
            yield f'{place}{name}: {theirs} -> {ours}'


def write(file: Path, content: dict[str, Any]) -> None:
    """As JSON with a line for each entry, so that a difference of two files can be read."""
    lines = [f'{json.dumps(key)}: {json.dumps(rounded(each))}' for key, each in content.items()]
    file.write_text('{\n' + ',\n'.join(lines) + '\n}\n')


def rounded(value: Any) -> Any:
    """Numbers with more digits than are compared, and fewer than processors agree on."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f'{float(text):.12g}'))


class Taken(BaseException):
    """Ends a program where somebody has what was wanted; no `except Exception` sees it."""


def run(program: str, *arguments: str) -> Any:
    """Runs a file, or a module, as a program; returns what is raised as `Taken`."""
    folder = str(Path(program).parent)  # Python finds there what a script imports
    run_it = runpy.run_path if program.endswith('.py') else runpy.run_module
    sys.modules.pop(program, None)  # runpy warns of a module that another test imported
    argv, path = [program, *arguments], [folder, *sys.path]
    with patch.object(sys, 'argv', argv), patch.object(sys, 'path', path):
        try:
            run_it(program, run_name='__main__')
        except Taken as taken:
            return taken.args[0]
    return None


def flags() -> dict[str, dict[str, Any]]:
    """By program, and by action of one that has several: option strings, arguments and choices."""

    def take(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        raise Taken(_flags(parser))

    programs = {path.stem: str(path) for path in sorted((ROOT / 'tools').glob('*.py'))}
    programs['vqmoe_vision'] = 'vqmoe_vision.__main__'
    with patch.object(argparse.ArgumentParser, 'parse_known_args', take):
        # the demo has no parser, and would start
        return {name: run(program) for name, program in programs.items() if name != 'demo'}


def _flags(parser: argparse.ArgumentParser) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {name: _flags(own) for name, own in action.choices.items()}
        else:
            names = ', '.join(action.option_strings) or f'{action.dest} {action.nargs or 1}'
            choices = action.choices and sorted(map(str, action.choices))
            found[names] = {'choices': choices} if choices else {}
    return found


def configs() -> dict[str, dict[str, str]]:
    """What each config is once what it builds on is read: JSON of values by dotted name."""
    from mmengine.config import Config

    import vqmoe_vision.segmentation  # noqa: F401  as tools, that configs may be named

    paths = sorted((ROOT / 'configs').rglob('*.py'))
    found = {path: flat(Config.fromfile(path).to_dict()) for path in paths}
    return {path.relative_to(ROOT / 'configs').as_posix(): each for path, each in found.items()}


def flat(config: Any, name: str = '') -> dict[str, str]:
    """JSON of values by dotted name, with paths from the root of the repository."""
    if not isinstance(config, dict) or not config:
        return {name: json.dumps(config, sort_keys=True, default=repr).replace(f'{ROOT}/', '')}
    fields: dict[str, str] = {}
    for key, value in config.items():
        fields |= flat(value, f'{name}.{key}'.strip('.'))
    return fields
