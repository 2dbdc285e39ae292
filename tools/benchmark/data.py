"""`benchmark.py data`: what a worker of a config's training data does with an image.

The batches are made in this process, as a worker makes them, and timed by its processor time.
Images come from the system's cache of files once they have been read. Handing a batch to the
training process is not in it. Needs the extra `train`, and `seg` for configs of segmentation.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from vqmoe_vision.moe.config import check

from .environment import describe_machine
from .report import write
from .training import settings_of

GPU_RATE = 1000  # images per second of which the number of workers is told
REST = 'sampler, seeds, the rest'
# options of a loader with processes
_OF_WORKERS = ('persistent_workers', 'prefetch_factor', 'worker_init_fn', 'pin_memory')


class PartClock:
    """Adds up the processor time of calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, call: Callable) -> Callable:
        """The same call, whose time is added up; a name that is taken gets a number."""
        same = sum(known.partition(' #')[0] == name for known in self.seconds)
        name = f'{name} #{same + 1}' if same else name
        self.seconds[name] = 0.0

        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            result = call(*args, **kwargs)
            self.seconds[name] += time.process_time() - begin
            return result

        return run


class TimedSource(Sequence):
    """The pairs behind a data set, whose reading and decoding is timed."""

    def __init__(self, source: Sequence, clock: PartClock) -> None:
        self._source, self._get = source, clock.timed('reading, decoding', source.__getitem__)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        return self._get(index)


def add_clocks(loader: Any, clock: PartClock) -> None:
    """Puts a clock around what a data set and its loader do with an image."""
    dataset = loader.dataset
    if hasattr(dataset, 'transform') and hasattr(dataset, 'source'):
        dataset.source = TimedSource(dataset.source, clock)
    steps = getattr(dataset, 'pipeline', None) or getattr(dataset, 'transform', None)
    listed = getattr(steps, 'transforms', None)
    if isinstance(listed, list):
        listed[:] = [clock.timed(type(step).__name__, step) for step in listed]
    loader.collate_fn = clock.timed('collate', loader.collate_fn)


def measure_data(config: str, options: Sequence[str], images: int) -> dict[str, Any]:
    """Make training batches of a config in this process."""
    check(images >= 1, '--images', images, 'at least 1')
    loader = _loader(settings_of(config, options))
    clock = PartClock()
    add_clocks(loader, clock)
    endless, batches = _batches(loader), -(-images // loader.batch_size)
    next(endless)  # what is imported and cached at first
    clock.seconds.update(dict.fromkeys(clock.seconds, 0.0))
    begin = time.process_time()
    for _ in range(batches):
        next(endless)
    whole, measured = time.process_time() - begin, batches * loader.batch_size
    seconds = {**clock.seconds, REST: whole - sum(clock.seconds.values())}
    return {
        'config': config,
        'options': list(options),
        'images': measured,
        'parts_ms': {part: spent / measured * 1e3 for part, spent in seconds.items()},
        'images_per_s': measured / whole,
    }


def _loader(settings: Any) -> Any:
    """The training loader of a config, without processes, set up as one of its workers is."""
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner
    from mmengine.runner.utils import set_random_seed
    from mmengine.utils.dl_utils import set_multi_processing

    init_default_scope(settings.get('default_scope', 'mmengine'))
    set_multi_processing(**settings.env_cfg.get('mp_cfg', {}))
    torch.set_num_threads(1)
    seed = settings.get('randomness', {}).get('seed', 0)
    set_random_seed(seed)
    options = {k: v for k, v in settings.train_dataloader.items() if k not in _OF_WORKERS}
    loader = Runner.build_dataloader({**options, 'num_workers': 0}, seed=seed)
    of_batch = f'at most the {len(loader.dataset)} images of the data set'
    check(len(loader) > 0, 'train_dataloader.batch_size', loader.batch_size, of_batch)
    return loader


def _batches(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def data_table(row: Mapping[str, Any]) -> str:
    """What an image costs by part, and how many workers a fast GPU needs."""
    whole, rate = sum(row['parts_ms'].values()), row['images_per_s']
    lines = [
        f'{part:<36}{ms:>9.3f} ms {ms / whole:>6.1%}'
        for part, ms in (*row['parts_ms'].items(), ('image', whole))
    ]
    lines += [
        f'{rate:.1f} images per second of processor time',
        f'workers, a core each, for {GPU_RATE:,} images per second: {math.ceil(GPU_RATE / rate)}',
    ]
    return '\n'.join(lines)


def run_data(args: argparse.Namespace) -> None:
    """Measures a config and prints where the time goes."""
    row = measure_data(args.config, args.cfg_options, args.images)
    header = describe_machine('cpu')
    print(*(f'{name}: {value}' for name, value in header.items()), sep='\n')
    print(f'\n{args.config} {" ".join(args.cfg_options)}, {row["images"]} images')
    print(data_table(row))
    if args.out is not None:
        write(args.out, {'command': 'data', 'header': header, 'rows': [row]})
