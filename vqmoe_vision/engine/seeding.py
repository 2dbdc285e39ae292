"""What makes a resumed run equal to one that was never interrupted: seeds, samplers and loops."""

import operator
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.dataset import ClassBalancedDataset, DefaultSampler, InfiniteSampler
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS, HOOKS, LOOPS
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.utils import apply_to
from torch import Tensor

from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.config import check

from .config import flat
from .model import unwrapped, without_sources
from .optim import KERNELS_FOR_LISTS


def seed_generators(*parts: int) -> None:
    """Seeds python, numpy and torch with a hash of integers."""
    seed = _hash(*parts)
    _seed_processor(seed)
    if torch.accelerator.is_available():  # without one, half a millisecond for nothing
        torch.manual_seed(seed)


def _seed_processor(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def _hash(*parts: int) -> int:
    # or seed 0 at iteration 1 would be seed 1 at iteration 0
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@contextmanager
def drawn_apart(part: int) -> Iterator[None]:
    """Random numbers of torch that follow from the run's seed alone, and move no generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_hash(torch.initial_seed(), part))
        yield


@HOOKS.register_module()
class ReseedHook(Hook):
    """Seeds python, numpy and torch at each iteration from the run's seed and the iteration.

    Nothing about random numbers then needs to be in a checkpoint: a run that resumes at the start
    of an epoch draws what the uninterrupted run drew, data augmentation included.
    """

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Before the forward pass."""
        seed_generators(runner.seed, runner.iter, get_rank())

    # before the data loader starts: it draws its workers' seeds from torch's generator
    before_train_epoch = before_train_iter


_SAMPLES = 1  # tells the seeds of samples from those of iterations


class SeededIndex(int):
    """Index of a sample that brings the seed of its augmentation."""

    parts: tuple[int, ...]


def _seeded(index: int, *parts: int) -> SeededIndex:
    seeded = SeededIndex(index)
    seeded.parts = parts
    return seeded


def with_seed_of(outer: int, inner: int) -> int:
    """What a wrapper of data sets that looks indices up hands on."""
    return _seeded(inner, *outer.parts) if isinstance(outer, SeededIndex) else inner


def _keeps_seed(how: Callable[[int, int], int]) -> Callable[[SeededIndex, Any], int]:
    """An operation of indices, as wrappers of data sets compute with them."""

    def computed(index: SeededIndex, other: Any) -> int:
        if not hasattr(other, '__index__'):  # such as a float
            return NotImplemented
        # Python's integer in the place of NumPy's, which would compute itself and lose the seed
        return with_seed_of(index, how(int(index), operator.index(other)))

    return computed


for _name in ('add', 'sub', 'mod', 'floordiv'):
    setattr(SeededIndex, f'__{_name}__', _keeps_seed(getattr(operator, _name)))
SeededIndex.__radd__ = SeededIndex.__add__  # type: ignore[method-assign]


def seed_sample(index: int) -> None:
    """What a data set calls first for a sample, so that its augmentation is its own."""
    if isinstance(index, SeededIndex):
        # images are augmented by the processor: `torch.manual_seed` also leaves a seed for every
        # other kind of device, with a trace of who called, which takes a hundred times as long
        _seed_processor(_hash(*index.parts))


@DATASETS.register_module()
class SeededClassBalancedDataset(ClassBalancedDataset):
    """mmengine's `ClassBalancedDataset`, whose samples keep the seeds that their indices bring."""

    def _get_ori_dataset_idx(self, idx: int) -> int:
        return with_seed_of(idx, super()._get_ori_dataset_idx(idx))


@DATA_SAMPLERS.register_module()
class SeededSampler(DefaultSampler):
    """mmengine's `DefaultSampler`, for epochs, whose indices bring the seed of their augmentation.

    It follows from the run's seed, the epoch and the index, for all models and any number of
    workers and processes. The data set has to call `seed_sample`.
    """

    _passed_over = 0

    def pass_over(self, num_samples: int) -> None:
        """Passes over the first samples of the next epoch, of this process.

        Not `skip`: mmengine calls that with the samples of all epochs, as if each batch were full.
        """
        self._passed_over = num_samples

    def __iter__(self) -> Iterator[int]:
        seeded = (
            _seeded(index, self.seed, self.epoch, index, _SAMPLES) for index in super().__iter__()
        )
        passed_over, self._passed_over = self._passed_over, 0
        return islice(seeded, passed_over, None)


@DATA_SAMPLERS.register_module()
class SeededInfiniteSampler(InfiniteSampler):
    """mmengine's `InfiniteSampler`, whose indices bring the seed of their augmentation.

    It follows from the run's seed and the position among the samples of all processes, also after a
    resume in the middle of a worker's stream. The data set has to call `seed_sample`.
    """

    def _indices_of_rank(self) -> Iterator[int]:
        # processes take turns with samples
        for position, index in enumerate(super()._indices_of_rank()):
            yield _seeded(index, self.seed, position * self.world_size + self.rank, 0, _SAMPLES)


@FUNCTIONS.register_module()
def keep_worker_seed(worker_id: int) -> None:
    """A `worker_init_fn` that leaves the seeds PyTorch gave the worker.

    mmengine's default seeds it alike in every epoch, and so repeats the augmentations.
    """


SEEN, SIZE = 'batches_seen_in_epoch', 'size_of_batches'
PROCESSES = 'processes_in_epoch'
_FIELDS = {SIZE: 'train_dataloader.batch_size', PROCESSES: 'number of processes'}
VALIDATED = 'validated_iter'
_ACCUMULATED = 'accumulated'


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's loop, which starts an epoch again when it resumes in the middle of it.

    This one passes over the samples that the epoch has seen.
    """

    def run_epoch(self) -> None:
        """Iterates over what is left of an epoch."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        hub, sampler = self.runner.message_hub, self.dataloader.sampler
        seen = hub.get_info(SEEN, 0)
        for name, value in {PROCESSES: get_world_size(), SIZE: self.dataloader.batch_size}.items():
            former = hub.get_info(name, value)
            allowed = f'{former}, in the middle of an epoch that a checkpoint goes on with'
            check(not seen or former == value, _FIELDS[name], value, allowed)
            hub.update_info(name, value)
        if hasattr(sampler, 'pass_over') and self.dataloader.batch_size is not None:
            sampler.pass_over(seen * self.dataloader.batch_size)
            batches: Iterable = enumerate(self.dataloader, start=seen)
        else:  # of an order that only the data loader knows: what was seen is read again
            batches = islice(enumerate(self.dataloader), seen, None)
        for index, batch in batches:
            self.run_iter(index, batch)  # in which `AtomicCheckpointHook` counts
        hub.update_info(SEEN, 0)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1


def check_batches(runner: Runner) -> None:
    """Refuses an epoch without an iteration, or without an end."""
    loader, size = runner.train_dataloader, get_world_size()
    if isinstance(loader.sampler, InfiniteSampler):
        # which fills a batch with the images of several rounds
        allowed = 'SeededSampler for training by epochs: an epoch of it never ends'
        ends = not isinstance(runner.train_loop, EpochBasedTrainLoop)
        check(ends, 'train_dataloader.sampler.type', type(loader.sampler).__name__, allowed)
        return
    each = f' for each of {size} processes' if size > 1 else ''
    allowed = f'at most {len(loader.sampler)}, the number of training images{each}'
    check(len(loader) > 0, 'train_dataloader.batch_size', loader.batch_size, allowed)


def progress_of(runner: Runner) -> tuple[int, int, str]:
    """What is done, what there is to do, and the option of `train_cfg` that says so."""
    loop = runner.train_loop
    if isinstance(loop, EpochBasedTrainLoop):
        return loop.epoch, loop.max_epochs, 'max_epochs'
    return loop.iter, loop.max_iters, 'max_iters'


def validation_was_cut_off(runner: Runner) -> bool:
    """Whether a run that resumes stands where one was due that its checkpoint knows nothing of."""
    loop = runner.train_loop
    done, end, _ = progress_of(runner)
    loop._decide_current_val_interval()  # or it would be that of the start of the run
    return (
        runner.val_loop is not None
        and runner._resume
        and done >= max(loop.val_begin, 1)
        and (done % loop.val_interval == 0 or done == end)
        and not runner.message_hub.get_info(SEEN, 0)
        and runner.message_hub.get_info(VALIDATED) != runner.iter
    )


SETTINGS = 'settings'
_LENGTH = 'len(train_dataloader.dataset)'
# A run that resumes has these of its checkpoint, and all others of its config.
_RESTORED = r'optim_wrapper\.(optimizer|paramwise_cfg|constructor)\b|param_scheduler|auto_scale_lr'
_TYPES = r'(optim_wrapper\.optimizer|param_scheduler(\.\d+)?)\.type'  # whose states differ


def read_settings(runner: Runner) -> dict[str, Any]:
    """Return the fields that decide how a run trains, by name and as plain values."""
    config = {n: runner.cfg.get(n) for n in ('optim_wrapper', 'param_scheduler', 'auto_scale_lr')}
    config['model'] = without_sources(runner.cfg.get('model') or {})
    settings = {
        name: value if isinstance(value, str | int | float | None) else str(value)
        for name, value in flat(config).items()
        if name.rpartition('.')[2] not in KERNELS_FOR_LISTS  # which are the card's
    }
    batches = get_world_size() * runner.optim_wrapper._accumulative_counts
    settings['total_batch_size'] = (runner.train_dataloader.batch_size or 1) * batches
    return settings | {_LENGTH: len(runner.train_dataloader.dataset)}


def check_settings(runner: Runner, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that resumes, and warn where config and checkpoint differ.

    A state that does not fit is refused, and data of another length that are read in random order.
    """
    settings, differences = read_settings(runner), []
    saved = checkpoint['meta'].get(SETTINGS) or settings
    shuffles = getattr(runner.train_dataloader.sampler, 'shuffle', True)
    for name in {**saved, **settings}:
        former, value = saved.get(name), settings.get(name)
        restored = re.match(_RESTORED, name)
        settings[name] = former if restored else value
        if former != value:
            fits = not re.fullmatch(_TYPES, name) and (name != _LENGTH or not shuffles)
            check(fits, name, value, f'{former!r}, as in the checkpoint that --resume goes on with')
            differences.append(
                f'{ascii(name)[1:-1]} is {former!r} in the checkpoint and {value!r} in the config, '
                f'the {"checkpoint" if restored else "config"} counts'
            )
    if differences:
        runner.logger.warning(f'--resume: {"; ".join(differences)}')
    return settings


def saves_after_iteration(hook: Hook, runner: Runner) -> bool:
    """Whether a hook writes a checkpoint after the iteration that is ending."""
    if not isinstance(hook, CheckpointHook) or hook.by_epoch:
        return False
    due = hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
    return due or (hook.save_last and hook.is_last_train_iter(runner))


def keep_accumulated(runner: Runner, checkpoint: dict[str, Any]) -> None:
    """Adds gradients, and what layers have observed, that no step has used yet to a checkpoint."""
    # of several processes they are lost; from the best one, without optimizer, no training goes on
    lost = get_world_size() > 1 or 'optimizer' not in checkpoint
    if lost or runner.optim_wrapper.should_update():
        return
    model = unwrapped(runner)
    kept = {  # as mmengine keeps all else
        'gradients': {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        'observed': {name: layer.observed for name, layer in moe_layers(model).items()},
    }
    checkpoint[_ACCUMULATED] = apply_to(kept, lambda x: isinstance(x, Tensor), Tensor.cpu)


def restore_accumulated(runner: Runner, checkpoint: dict[str, Any]) -> None:
    """Puts what a checkpoint kept where the next batch adds to it."""
    if _ACCUMULATED not in checkpoint:
        return
    model, kept = unwrapped(runner), checkpoint[_ACCUMULATED]
    parameters, layers = dict(model.named_parameters()), moe_layers(model)
    for name, gradient in kept['gradients'].items():
        parameters[name].grad = gradient.to(parameters[name].device).view_as(parameters[name])
    for name, observed in kept['observed'].items():
        layers[name].observed = observed
    # mmengine warns that they are lost
    runner.logger.info('What waits for more batches is that of the checkpoint')
