"""How far a training is, and what it owes there: a checkpoint, or a validation."""

from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from .loops import SEEN

VALIDATED = 'validated_iter'


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
