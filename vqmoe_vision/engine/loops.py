"""Training that goes on in the middle: of an epoch, an accumulated gradient, a validation."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.utils import apply_to
from torch import Tensor

from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.config import check

from .model import unwrapped

SEEN, SIZE = 'batches_seen_in_epoch', 'size_of_batches'
PROCESSES = 'processes_in_epoch'
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


def saves_after_iteration(hook: Hook, runner: Runner) -> bool:
    """Whether a hook writes a checkpoint after the iteration that is ending."""
    if not isinstance(hook, CheckpointHook) or hook.by_epoch:
        return False
    due = hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
    return due or (hook.save_last and hook.is_last_train_iter(runner))


def keep_accumulated(runner: Runner, checkpoint: dict[str, Any]) -> None:
    """Adds gradients, and what layers have observed, that no step has used yet to a checkpoint."""
    if runner.optim_wrapper.should_update() or get_world_size() > 1:  # of several they are lost
        return
    if 'optimizer' not in checkpoint:  # as in the best one, from which no training goes on
        return
    model = unwrapped(runner)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    observed = {name: layer.observed for name, layer in moe_layers(model).items()}
    # as mmengine keeps all else
    kept = {'gradients': gradients, 'observed': observed}
    checkpoint[_ACCUMULATED] = apply_to(kept, lambda x: isinstance(x, Tensor), Tensor.cpu)


def restore_accumulated(runner: Runner, checkpoint: dict[str, Any]) -> None:
    """Puts what a checkpoint kept where the next batch adds to it."""
    if _ACCUMULATED not in checkpoint:
        return
    model, kept = unwrapped(runner), checkpoint[_ACCUMULATED]
    parameters, layers = dict(model.named_parameters()), moe_layers(model)
    try:
        for name, gradient in kept['gradients'].items():
            parameter = parameters[name]
            parameter.grad = gradient.to(parameter.device).view_as(parameter)
        for name, observed in kept['observed'].items():
            layers[name].observed = observed
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f'{_ACCUMULATED!r} of the checkpoint does not fit the model: {error}'
        ) from error
    # mmengine warns that they are lost
    runner.logger.info('What waits for more batches is that of the checkpoint')
