"""Random numbers that make a resumed run equal to one that was never interrupted."""

import random

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import FUNCTIONS, HOOKS
from mmengine.runner import Runner


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
        # Hashed, because seed 0 at iteration 1 must not be seed 1 at iteration 0.
        state = np.random.SeedSequence([runner.seed, runner.iter, get_rank()]).generate_state(1)
        seed = int(state[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


@FUNCTIONS.register_module()
def keep_worker_seed(worker_id: int) -> None:
    """A data loader's `worker_init_fn` that leaves the seeds PyTorch gave the worker.

    PyTorch seeds python, numpy and torch in each worker anew at each epoch. mmengine's default
    overwrites that with the same seed in every epoch, and so repeats the augmentations.

    Args:
        worker_id: Ignored.
    """
