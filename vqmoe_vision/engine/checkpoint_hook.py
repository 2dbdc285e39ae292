"""Saves that survive whatever ends a run."""

import inspect
import time
from collections import deque
from math import inf, nextafter
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner

from vqmoe_vision.moe.config import check

from .accumulated import keep_accumulated, restore_accumulated
from .checkpoint_files import (
    BEST,
    POINTER,
    RUN,
    candidates,
    check_template,
    delete,
    identify,
    newest_checkpoint,
    newest_time,
    remove_partial,
    write_atomically,
)
from .loops import SEEN
from .processes import timeout_of
from .progress import VALIDATED, progress_of, validation_was_cut_off
from .stop import StopSignals, keep_workers

_OUTDATED = 'outdated_ckpts'


@HOOKS.register_module('CheckpointHook', force=True)
class AtomicCheckpointHook(CheckpointHook):
    """Saves that are whole at every moment, also of a run that is stopped; takes mmengine's name.

    A file is written beside its place and renamed, old ones are deleted after that, and nothing
    outside the work dir is touched. A run that resumes takes the newest file that reads completely,
    and validates first where a validation was cut off.

    Args:
        interval: Epochs, or iterations, between checkpoints.
        **options: As mmengine's, without those of another place for the files.

    Raises:
        ValueError: An option is unknown, or names another place or files that no run would find.
    """

    keep_ckpt_ids: deque[int]

    def __init__(self, interval: int = -1, **options: Any) -> None:
        # mmengine keeps what it does not know for the call that saves, which fails on it
        for name in options.keys() - inspect.signature(CheckpointHook).parameters:
            check(False, f'default_hooks.checkpoint.{name}', options[name], 'left out: not known')
        for name in ('out_dir', 'backend_args', 'file_client_args'):
            if options.get(name) is not None:
                raise ValueError(
                    f'{name}={options[name]!r} is not supported: checkpoints are files in the work '
                    'dir, --work-dir'
                )
        check_template(options.get('filename_tmpl') or '{}.pth')
        super().__init__(interval, **{**options, 'backend_args': {'backend': 'atomic'}})
        self._outdated: list[str] = []
        self._saved_iter = -1
        self._resumed_from = self._run = ''
        self._saved_at = 0.0
        self._validating = False
        self._training = False

    def before_run(self, runner: Runner) -> None:
        """Chooses the checkpoint of a run that resumes, for mmengine follows the pointer alone."""
        folder = Path(runner.work_dir)
        follows = runner._resume and runner._load_from is None
        if follows and (candidates(folder) or (folder / POINTER).is_file()):
            runner._load_from = str(newest_checkpoint(folder, runner.logger.warning))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Goes on with what waited for more batches."""
        self._resumed_from = Path(str(runner._load_from)).name
        if runner._resume:
            restore_accumulated(runner, checkpoint)

    def before_train(self, runner: Runner) -> None:
        """Finds the files that a checkpoint names in the work dir, wherever that is today."""
        hub, folder = runner.message_hub, Path(runner.work_dir)
        if is_main_process():
            self._run = identify(folder, runner._resume, hub.get_info(RUN))
            hub.update_info(RUN, self._run)
        super().before_train(runner)
        self._outdated = self.file_backend.outdated  # where mmengine's hook adds to them
        names = hub.get_info(_OUTDATED, [])
        self._outdated += [str(name) for name in names] if isinstance(names, list) else []
        for key, path in self._best().items():
            name = Path(str(path)).name
            known = name.startswith(BEST) and (folder / name).is_file()
            self._set_best(key, str(folder / name) if known else None)
        # mmengine writes the last one again after a new best, if this process has written it
        last = folder / Path(str(hub.get_info('last_ckpt'))).name
        # as the first process sees it: a disk of a network shows a file to some of them later
        seen = [str(last) if last in candidates(folder) else None]
        broadcast_object_list(seen)
        self.last_ckpt = seen[0]
        if is_main_process():
            remove_partial(folder, self._run)
        self._saved_at = newest_time(folder)
        self._progress = (runner.epoch, runner.iter)
        spread = runner.cfg.get('parallel') is not None
        self._signals = StopSignals(lambda: self._save_now(runner), timeout_of(runner.cfg), spread)
        self._training = True
        for loop in (runner.train_loop, runner.val_loop):
            if loop is not None:
                keep_workers(loop.dataloader)
        if validation_was_cut_off(runner):
            runner.logger.info(
                'Validating first: the checkpoint does not say that it was validated'
            )
            runner.val_loop.run()
        done, end, limit = progress_of(runner)
        if done >= end:
            runner.logger.info(f'Nothing is left to train: train_cfg.{limit}={end} is reached')

    def before_train_epoch(self, runner: Runner) -> None:
        """Ends a run that was told to stop between two epochs."""
        self._progress = (runner.epoch, runner.iter)
        self._signals.obey()
        self._signals.at_once = True  # the first batch may take its time

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """A run that is told to stop does so after this iteration."""
        self._signals.at_once = False

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Saves where that is due, and ends a run that was told to stop."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            runner.message_hub.update_info(SEEN, batch_idx + 1)
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        self._progress = (runner.epoch, runner.iter + 1)
        self._signals.obey()
        # after the last iteration of an epoch other hooks change what is saved
        last = batch_idx + 1 == len(runner.train_dataloader) or self.is_last_train_iter(runner)
        self._signals.at_once = not last

    def before_val(self, runner: Runner) -> None:
        """Until the first batch hooks change what is saved."""
        if self._training:  # a validation alone, of `Runner.val`, saves nothing
            self._signals.at_once = False

    def before_val_epoch(self, runner: Runner) -> None:
        """A run that is told to stop does not wait for the validation."""
        if not self._training:
            return
        self._progress = (runner.epoch, runner.iter)
        self._validating = True
        self._signals.obey()
        self._signals.at_once = True

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """After the last batch hooks change what is saved."""
        if self._training and batch_idx + 1 == len(runner.val_dataloader):
            self._signals.at_once = False

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Saves the best, and ends a run that was told to stop."""
        if not self._training:
            return
        self._validating = False
        runner.message_hub.update_info(VALIDATED, runner.iter)
        super().after_val_epoch(runner, metrics)
        self._signals.obey()

    def after_train(self, runner: Runner) -> None:
        """Gives the signals back, and deletes what a kill after the last save has left."""
        self._signals.release()
        # whatever a checkpoint says, the one that the run went on from may be the last sound one
        self._outdated[:] = [name for name in self._outdated if name != self._resumed_from]
        self._delete_outdated(Path(str(self.last_ckpt)).name)
        super().after_train(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Leaves names without folders in a checkpoint, and when it was written."""
        # later than all others, also where the clock was set back
        self._saved_at = max(time.time(), nextafter(self._saved_at, inf))
        checkpoint['meta']['saved_at'] = self._saved_at
        keep_accumulated(runner, checkpoint)
        info = checkpoint['message_hub']['runtime_info']
        for key, value in info.items():
            if key.startswith(('best_ckpt', 'last_ckpt')):
                info[key] = Path(str(value)).name

    def _save_now(self, runner: Runner) -> int:
        """Saves a run that is told to stop, whatever the interval."""
        epoch, iteration = self._progress
        if self._validating:
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):  # validation is with the averages
                    hook._swap_ema_parameters()
        if self._saved_iter != iteration:
            meta = {'epoch': epoch, 'iter': iteration}
            if self.by_epoch and runner.message_hub.get_info(SEEN, 0):
                name = f'iter_{iteration}.pth'
                self._outdated.append(name)  # once the run that goes on from it has saved
                self._save(runner, name, meta)
            else:
                self._save_checkpoint_with_step(runner, epoch if self.by_epoch else iteration, meta)
        runner.visualizer.close()
        return iteration

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                self._outdated.append(self.filename_tmpl.format(self.keep_ckpt_ids[0]))
            self.keep_ckpt_ids.append(step)  # in the place of the oldest
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self._save(runner, self.filename_tmpl.format(step), meta)

    def _save(self, runner: Runner, name: str, meta: dict) -> None:
        folder = Path(self.out_dir)
        self.last_ckpt = str(folder / name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.message_hub.update_info(_OUTDATED, self._outdated)
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        self._saved_iter = meta['iter']
        if is_main_process():
            write_atomically(folder / POINTER, name.encode())
        self._delete_outdated(name)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, float]) -> None:
        if not self.save_best:
            return
        for key in self.key_indicators:
            allowed = f'a metric of the validation, which are {", ".join(metrics)}'
            check(key in (*metrics, 'auto'), 'save_best', key, allowed)
        super()._save_best_checkpoint(runner, metrics)
        self._delete_outdated()  # of the best ones: a run goes on from the others

    def _best(self) -> dict[str, str | None]:
        """Paths of the best files by metric; of one metric by no name."""
        if not self.save_best:
            return {}
        if len(self.key_indicators) == 1:
            return {'': self.best_ckpt_path}
        return {key: self.best_ckpt_path_dict.get(key) for key in self.key_indicators}

    def _set_best(self, key: str, path: str | None) -> None:
        if key:
            self.best_ckpt_path_dict[key] = path
        else:
            self.best_ckpt_path = path

    def _delete_outdated(self, current: str | None = None) -> None:
        """Deletes outdated files, those that a run could go on from only after a newer one."""
        names = [n for n in self._outdated if current is not None or n.startswith(BEST)]
        kept = {current, *(Path(path).name for path in self._best().values() if path)}
        if is_main_process():
            delete(Path(self.out_dir), [name for name in names if name not in kept], self._run)
        self._outdated[:] = [name for name in self._outdated if name not in names]
