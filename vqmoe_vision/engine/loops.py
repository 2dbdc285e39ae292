"""Training by epochs that goes on in the middle of one."""

from collections.abc import Iterable
from itertools import islice

from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_world_size
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, Runner

from vqmoe_vision.moe.config import check

SEEN, SIZE = 'batches_seen_in_epoch', 'size_of_batches'
PROCESSES = 'processes_in_epoch'


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's loop, which starts an epoch again when it resumes in the middle of it.

    This one passes over the samples that the epoch has seen.
    """

    def run_epoch(self) -> None:
        """Iterates over what is left of an epoch."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        seen = self._seen()
        sampler = self.dataloader.sampler
        if hasattr(sampler, 'pass_over') and self.dataloader.batch_size is not None:
            sampler.pass_over(seen * self.dataloader.batch_size)
            batches: Iterable = enumerate(self.dataloader, start=seen)
        else:  # of an order that only the data loader knows: what was seen is read again
            batches = islice(enumerate(self.dataloader), seen, None)
        for index, batch in batches:
            self.run_iter(index, batch)  # in which `AtomicCheckpointHook` counts
        self.runner.message_hub.update_info(SEEN, 0)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _seen(self) -> int:
        hub, size = self.runner.message_hub, self.dataloader.batch_size
        seen = hub.get_info(SEEN, 0)
        former = hub.get_info(SIZE, size)
        if seen and former != size:
            raise ValueError(
                f'train_dataloader.batch_size={size} is not possible: the checkpoint is in the '
                f'middle of an epoch, which goes on with {former}'
            )
        processes = get_world_size()
        shared = hub.get_info(PROCESSES, processes)
        if seen and shared != processes:
            many = 'process is' if processes == 1 else 'processes are'
            raise ValueError(
                f'{processes} {many} not possible: the checkpoint is in the middle of an '
                f'epoch, which goes on with {shared}'
            )
        hub.update_info(SIZE, size)
        hub.update_info(PROCESSES, processes)
        return seen


def check_batches(runner: Runner) -> None:
    """Refuses an epoch without an iteration, or without an end."""
    loader = runner.train_dataloader
    if isinstance(loader.sampler, InfiniteSampler):
        # which fills a batch with the images of several rounds
        own = getattr(type(runner.train_loop), 'run_epoch', None)
        allowed = (
            'an epoch of it never ends: SeededSampler for training by epochs, or '
            "train_cfg.type='IterBasedTrainLoop' with max_iters"
        )
        ends = own is not ResumableEpochLoop.run_epoch
        check(ends, 'train_dataloader.sampler.type', type(loader.sampler).__name__, allowed)
    elif len(loader) == 0:
        size = get_world_size()
        of_each = f' for each of {size} processes' if size > 1 else ''
        raise ValueError(
            f'train_dataloader.batch_size={loader.batch_size} must be at most '
            f'{len(loader.sampler)}, the number of training images{of_each}: drop_last=True '
            'leaves out what fills no batch'
        )
