"""Random numbers that make a resumed run equal to one that was never interrupted."""

import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.dataset import ClassBalancedDataset, DefaultSampler, InfiniteSampler
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS, HOOKS
from mmengine.runner import Runner


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

    def before_train_epoch(self, runner: Runner) -> None:
        """Before the data loader starts: it draws its workers' seeds from torch's generator."""
        self._reseed(runner)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object | None = None
    ) -> None:
        """Before the forward pass."""
        self._reseed(runner)

    @staticmethod
    def _reseed(runner: Runner) -> None:
        seed_generators(runner.seed, runner.iter, get_rank())


_SAMPLES = 1  # tells the seeds of samples from those of iterations


class SeededIndex(int):
    """Index of a sample that brings the seed of its augmentation."""

    parts: tuple[int, ...]

    def __add__(self, other: int) -> int:
        return with_seed_of(self, super().__add__(_whole(other)))

    __radd__ = __add__

    def __sub__(self, other: int) -> int:
        return with_seed_of(self, super().__sub__(_whole(other)))

    def __mod__(self, other: int) -> int:
        return with_seed_of(self, super().__mod__(_whole(other)))

    def __floordiv__(self, other: int) -> int:
        return with_seed_of(self, super().__floordiv__(_whole(other)))


def _whole(number: Any) -> Any:
    """Python's integer in the place of NumPy's, which would compute itself and lose the seed."""
    return operator.index(number) if hasattr(number, '__index__') else number


def _seeded(index: int, *parts: int) -> SeededIndex:
    seeded = SeededIndex(index)
    seeded.parts = parts
    return seeded


def with_seed_of(outer: int, inner: int) -> int:
    """What a wrapper of data sets that looks indices up hands on."""
    if not isinstance(outer, SeededIndex) or inner is NotImplemented:
        return inner
    return _seeded(inner, *outer.parts)


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
            place = position * self.world_size + self.rank
            yield _seeded(index, self.seed, place, 0, _SAMPLES)


@FUNCTIONS.register_module()
def keep_worker_seed(worker_id: int) -> None:
    """A `worker_init_fn` that leaves the seeds PyTorch gave the worker.

    mmengine's default seeds it alike in every epoch, and so repeats the augmentations.
    """
