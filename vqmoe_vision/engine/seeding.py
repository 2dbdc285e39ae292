"""Random numbers that make a resumed run equal to one that was never interrupted."""

import random
from collections.abc import Iterator

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, FUNCTIONS, HOOKS
from mmengine.runner import Runner


def seed_generators(*parts: int) -> None:
    """Seeds python, numpy and torch with a hash of integers.

    Hashed, because seed 0 at iteration 1 must not be seed 1 at iteration 0.

    Args:
        *parts: At least 0, such as the run's seed and the iteration.
    """
    seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


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
    """Index of a sample that brings the seed of its augmentation.

    Attributes:
        parts: What `seed_generators` takes.
    """

    parts: tuple[int, ...]


@DATA_SAMPLERS.register_module()
class SeededInfiniteSampler(InfiniteSampler):
    """mmengine's `InfiniteSampler`, whose indices know their position in the run.

    A run that is counted in iterations resumes in the middle of a worker's stream of random
    numbers, which nobody can restore. A sample that is augmented with a seed of its own, from the
    run's seed, the process and the position, is the same after a resume, and for every number of
    workers. The data set has to seed, as `vqmoe_vision.segmentation.data` does.
    """

    def _indices_of_rank(self) -> Iterator[int]:
        for position, index in enumerate(super()._indices_of_rank()):
            seeded = SeededIndex(index)
            seeded.parts = (self.seed, position, self.rank, _SAMPLES)
            yield seeded


@FUNCTIONS.register_module()
def keep_worker_seed(worker_id: int) -> None:
    """A data loader's `worker_init_fn` that leaves the seeds PyTorch gave the worker.

    PyTorch seeds python, numpy and torch in each worker anew at each epoch. mmengine's default
    overwrites that with the same seed in every epoch, and so repeats the augmentations.

    Args:
        worker_id: Ignored.
    """
