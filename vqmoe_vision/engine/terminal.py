"""What a terminal shows of a run: what is trained on what, a bar, and what came of it."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner
from tqdm import tqdm

from .config import innermost
from .model import unwrapped
from .seeding import progress_of


def of_terminal(logger: logging.Logger) -> list[logging.Handler]:
    """Handlers of a log that write no file."""
    return [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]


@contextmanager
def shown(runner: Runner, choice: str | None, told: str = '') -> Iterator[None]:
    """Shows what is told, and a run of `ToolRunner`: by a bar, by the log's lines, or briefly."""
    bars = choice == 'bar' or (choice is None and sys.stdout.isatty())
    with tqdm(file=sys.stdout, dynamic_ncols=True, disable=not bars or runner.rank > 0) as bar:
        for handler in of_terminal(runner.logger):
            if not bar.disable:
                handler.addFilter(lambda record: bar.clear() is None)
            # of other ranks it is that of errors
            elif handler.level == logging.WARNING and choice != 'brief':
                handler.setLevel(logging.INFO)
        runner.register_hook(hook := TerminalHook(runner, bar, choice == 'brief'), 'LOWEST')
        for line in told.strip().splitlines():
            hook.say(line)
        yield


class TerminalHook(Hook):
    """Says where a run begins and ends, and moves a bar between."""

    def __init__(self, runner: Runner, bar: Any, brief: bool) -> None:
        self._runner, self._bar, self._score = runner, bar, ''
        self._tells = brief or not bar.disable

    def say(self, line: str) -> None:
        """Shows a line, which the log file gets too."""
        self._runner.logger.info(line)
        if self._tells:
            self._bar.write(line)

    def _what(self, split: str) -> str:
        runner, loader = self._runner, f'{split}_dataloader'
        model = runner.cfg.model.get('module', runner.cfg.model)
        names = dict.fromkeys(str(part.type) for part in innermost(runner.cfg[loader].dataset))
        size = sum(parameter.numel() for parameter in unwrapped(runner).parameters()) / 1e6
        name = (model.get('backbone') or model).get('model_name', model.type)
        images = len(getattr(runner, loader).dataset)
        return f'{name} ({size:.1f} M parameters) on {" and ".join(names)} ({images} images)'

    def before_train(self, runner: Runner) -> None:
        """Says what is trained on what."""
        done, end, limit = progress_of(runner)
        kind = limit.removeprefix('max_')
        begun = f', from {kind} {done} on' if done else ''
        self.say(f'Training {self._what("train")}: {end} {kind}{begun}, into {runner.work_dir}')
        images, updates = runner.train_dataloader.batch_size, runner.optim_wrapper
        parts = runner.world_size, images, getattr(updates, '_accumulative_counts', 1)
        if images is not None and prod(parts) > images:
            told = '{} processes x {} images x {} batches'.format(*parts)
            self.say(f'Each step of the optimizer has {prod(parts)} images: {told}')
        self._bar.reset(runner.max_iters - runner.iter)

    def before_test(self, runner: Runner) -> None:
        """Says what is tested on what."""
        self.say(f'Testing {self._what("test")}')
        self._bar.reset(len(runner.test_dataloader))

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Moves the bar; the loss is the newest that somebody has read from the device."""
        losses = runner.message_hub.log_scalars.get('train/loss')
        loss = f'loss {losses.current():.4f}' if losses is not None and len(losses.data[0]) else ''
        self._bar.set_postfix_str('  '.join(filter(None, [loss, self._score])), refresh=False)
        self._bar.update()

    def after_test_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Moves the bar."""
        self._bar.update()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        """Keeps the score by which the best checkpoint is chosen, or the first."""
        saves = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
        asked = getattr(saves, 'key_indicators', None) or [*metrics][:1]
        self._score = '  '.join(f'{name} {metrics[name]:.2f}' for name in asked if name in metrics)

    def after_train(self, runner: Runner) -> None:
        """Says what came of it and where that lies."""
        paths = {n: runner.message_hub.get_info(f'{n}_ckpt') for n in ('best', 'last')}
        told = [f'{name} {path}' for name, path in paths.items() if path]
        self.say(', '.join(filter(None, ['Trained', self._score, *told])))

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        """Says the scores of the data set, without those of layers."""
        scores = (f'{n} {v:.2f}' for n, v in metrics.items() if not n.startswith('blocks.'))
        self.say('  '.join(['Tested', *scores]))
