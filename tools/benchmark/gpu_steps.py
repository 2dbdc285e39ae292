"""`benchmark.py gpu`: what training steps wait for on a card, in runs of configs too.

Where a card has no kernel for groups, those of experts wait by design, and nothing else may.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch

from vqmoe_vision.moe import METHODS

from .cells import Settings
from .gpu_stages import outcome, place_of

ROOT = Path(__file__).parents[2]
# a small config of each task, whose data come with a library
CONFIGS = {
    'classification': 'configs/classification/digits/demo/vit_tiny_vqmoe_demo.py',
    'segmentation': 'configs/segmentation/segmenter_vit-4x96-vqmoe_mask_1xb64-1k_digits-48x48.py',
}
SMALL_DATA = {'train_dataloader.dataset.num_scenes': 512}  # else clusters of 20,000 are sought
STEPS = 4  # of which the first two may wait: an optimizer makes its state


class Finished(Exception):
    """Enough steps have run."""


@contextmanager
def counted_waits(device: str) -> Iterator[Counter[str]]:
    """Counts whatever waits for a card, by its place; other devices have nothing to wait for."""
    places: Counter[str] = Counter()
    if not device.startswith('cuda'):
        yield places
        return

    def count(message: Warning | str, *_: Any, **__: Any) -> None:
        if 'synchronizing CUDA operation' in str(message):
            places[place_of(traceback.walk_stack(None))] += 1

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode('warn')
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)


def told_waits(places: Mapping[str, int], steps: int) -> tuple[str, bool]:
    """What some steps waited for, and whether kernels of experts alone did, as a card may need."""
    each = [f'{count / steps:g} at {place}' for place, count in places.items()]
    told = f'{sum(places.values()) / steps:g} waits a step'
    return ', '.join([told, *each]), all('moe/kernels/' in place for place in places)


def check_configs(settings: Settings) -> list[dict[str, Any]]:
    """Iterations of a config of each task with all hooks."""
    rows = [_config_row('classification', {}, settings)]
    for method in METHODS:
        options = {'model.backbone.model_name': f'vit_tiny_{method}', **SMALL_DATA}
        rows.append(_config_row('segmentation', options, settings, METHODS[method].needs_features))
    return rows


def _config_row(
    task: str, options: dict[str, Any], settings: Settings, needs_features: bool = False
) -> dict[str, Any]:
    step = ' '.join([f'{task}: {CONFIGS[task]}', *(f'{k}={v}' for k, v in options.items())])
    with TemporaryDirectory() as folder, outcome('', step=step) as row:
        from vqmoe_vision.engine.cli import load_config
        from vqmoe_vision.engine.optim import suit_card, use_amp

        config = load_config(str(ROOT / CONFIGS[task]), options)
        if needs_features:
            config.model.backbone.features = _untrained(config, Path(folder) / 'dense.pth')
        use_amp(config)
        suit_card(config, '')
        config.work_dir, config.log_level = folder, 'WARNING'
        # mmengine names runs by the second, and warns of a second one of that name in a process
        config.experiment_name = Path(folder).name
        _train(config, settings.device, row)
    return row


def _train(config: Any, device: str, row: dict[str, Any]) -> None:
    from mmengine.runner import Runner

    runner = Runner.from_cfg(config)
    step, numbers, places = runner.train_loop.run_iter, count(1), Counter[str]()

    def watched(*args: Any) -> None:
        with counted_waits(device) as found:
            step(*args)
        if (number := next(numbers)) > STEPS // 2:
            places.update(found)
        if number == STEPS:
            row['result'], row['ok'] = told_waits(places, STEPS - STEPS // 2)
            raise Finished

    runner.train_loop.run_iter = watched
    with suppress(Finished):
        runner.train()


def _untrained(config: Any, file: Path) -> str:
    """Saves a dense network of the backbone's shape, by which a method may read images."""
    backbone = config.model.backbone
    names = ['img_size', 'patch_size', 'depth', 'embed_dim', 'num_heads', 'class_token']
    shape = {name: backbone[name] for name in names}
    model = timm.create_model('vit_tiny_patch16_224', **shape, global_pool='')
    torch.save(model.state_dict(), file)
    return str(file)
