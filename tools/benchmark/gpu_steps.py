"""`benchmark.py gpu`: what training steps wait for on a card.

Steps of every method, classifying and segmenting, run with every wait for the host forbidden. Where
a card has no kernel for groups, experts wait by design, and their steps may.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from torch.nn.utils import clip_grad_norm_

from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe.kernels import KERNELS, kernel_of

from .cells import Settings
from .gpu_stages import outcome
from .networks import Comparison, Network

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
def waiting_forbidden(device: str) -> Iterator[None]:
    """Makes whatever waits for a card an error. Other devices have nothing to wait for."""
    if not device.startswith('cuda'):
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def experts_wait(device: str) -> bool:
    """Whether experts in bfloat16 read back on this card, as the kernel does that it takes."""
    kernel = kernel_of(torch.device(device), torch.bfloat16, (64, 64))
    return device.startswith('cuda') and KERNELS[kernel].ends_on_host


def check_methods(
    settings: Settings, sizes: Mapping[str, Any] | None = None, img_size: int = 224
) -> list[dict[str, Any]]:
    """Training steps of every method and of a dense model, in bfloat16."""
    waits = experts_wait(settings.device)
    options = [f'{name}={value}' for name, value in (sizes or {}).items()]
    names = {f'vit_tiny_{method}': waits for method in METHODS} | {'vit_tiny_patch16_224': False}
    specs = {','.join([name, *options]): may_wait for name, may_wait in names.items()}
    comparison = Comparison(
        models=tuple(specs), img_size=img_size, dtype='bfloat16', amp=True, modes=('training',)
    )
    build = partial(_step_of, comparison=comparison, settings=settings)
    return [
        _row(spec, partial(build, spec), settings, may_wait) for spec, may_wait in specs.items()
    ]


def _step_of(spec: str, comparison: Comparison, settings: Settings) -> Callable[[int], None]:
    """Forward, backward, clipping and optimizer of one model."""
    network = Network(spec, comparison, settings)
    network.model.train()

    def step(index: int) -> None:
        network.forward(index).backward()
        clip_grad_norm_(network.model.parameters(), 1.0)
        network.update()

    return step


def check_configs(settings: Settings) -> list[dict[str, Any]]:
    """Iterations of a config of each task with all hooks, as `check_methods`."""
    rows = [_config_row('classification', {}, settings)]
    for method in METHODS:
        options = {'model.backbone.model_name': f'vit_tiny_{method}', **SMALL_DATA}
        rows.append(_config_row('segmentation', options, settings, METHODS[method].needs_features))
    return rows


def _config_row(
    task: str, options: dict[str, Any], settings: Settings, needs_features: bool = False
) -> dict[str, Any]:
    step = ' '.join([f'{task}: {CONFIGS[task]}', *(f'{k}={v}' for k, v in options.items())])
    waits = experts_wait(settings.device)
    good = _nothing(settings.device, waits)
    with TemporaryDirectory() as folder, outcome(good, step=step) as row:
        from vqmoe_vision.engine.cli import load_config
        from vqmoe_vision.engine.optim import use_amp

        config = load_config(str(ROOT / CONFIGS[task]), options)
        if needs_features:
            config.model.backbone.features = _untrained(config, Path(folder) / 'dense.pth')
        use_amp(config)
        config.work_dir, config.log_level = folder, 'WARNING'
        # mmengine names runs by the second, and warns of a second one of that name in a process
        config.experiment_name = Path(folder).name
        _train(config, settings.device, waits)
    return row


def _train(config: Any, device: str, waits: bool) -> None:
    from mmengine.runner import Runner

    runner = Runner.from_cfg(config)
    runner.train_loop.run_iter = _watched(runner.train_loop.run_iter, device, waits)
    with suppress(Finished):
        runner.train()


def _untrained(config: Any, file: Path) -> str:
    """Saves a dense network of the backbone's shape, by which a method may read images."""
    backbone = config.model.backbone
    shape = {
        name: backbone[name]
        for name in ('img_size', 'patch_size', 'depth', 'embed_dim', 'num_heads', 'class_token')
    }
    torch.save(
        timm.create_model('vit_tiny_patch16_224', **shape, global_pool='').state_dict(), file
    )
    return str(file)


def _row(
    spec: str, build: Callable[[], Callable[[int], None]], settings: Settings, may_wait: bool
) -> dict[str, Any]:
    good = _nothing(settings.device, may_wait)
    with outcome(good, step=spec) as row, suppress(Finished):
        watched = _watched(build(), settings.device, may_wait)
        for index in count():
            watched(index)
    return row


def _watched(step: Callable[..., None], device: str, may_wait: bool) -> Callable[..., None]:
    """A step that ends after `STEPS`, and unless it may, does not wait in their second half."""
    numbers = count(1)

    def watched(*args: Any, **kwargs: Any) -> None:
        number = next(numbers)
        forbidden = number > STEPS // 2 and not may_wait
        with waiting_forbidden(device) if forbidden else nullcontext():
            step(*args, **kwargs)
        if number == STEPS:
            raise Finished

    return watched


def _nothing(device: str, may_wait: bool) -> str:
    if may_wait:
        return 'runs; experts wait, as their kernel does on this card'
    return 'waits for nothing' if device.startswith('cuda') else f'runs; {device} has no waits'
