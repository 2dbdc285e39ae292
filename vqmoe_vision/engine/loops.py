"""Training by epochs that goes on in the middle of one."""

from collections.abc import Iterable
from itertools import islice

from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop
from mmengine.runner import runner as upstream

SEEN = 'batches_seen_in_epoch'


@LOOPS.register_module('EpochBasedTrainLoop', force=True)
class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's loop, which starts an epoch again when it resumes in the middle of it.

    This one passes over the samples that the epoch has seen. It takes the name of mmengine's, so
    that every config that imports this package has it.
    """

    def run_epoch(self) -> None:
        """Iterates over what is left of an epoch."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        seen = self.runner.message_hub.get_info(SEEN, 0)
        sampler = self.dataloader.sampler
        if hasattr(sampler, 'skip') and self.dataloader.batch_size is not None:
            sampler.skip(seen * self.dataloader.batch_size)
            batches: Iterable = enumerate(self.dataloader, start=seen)
        else:  # of an order that only the data loader knows: what was seen is read again
            batches = islice(enumerate(self.dataloader), seen, None)
        for index, batch in batches:
            # before the iteration, at whose end a checkpoint may be written
            self.runner.message_hub.update_info(SEEN, index + 1)
            self.run_iter(index, batch)
        self.runner.message_hub.update_info(SEEN, 0)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1


upstream.EpochBasedTrainLoop = ResumableEpochLoop  # of `train_cfg.by_epoch`
