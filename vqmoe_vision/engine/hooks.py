"""Hooks for models with MoE layers, used by classification and segmentation alike."""

import math
import os
from collections.abc import Sequence
from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from vqmoe_vision.models.create import check_upcycled
from vqmoe_vision.models.stated_experts import STATED, state_experts
from vqmoe_vision.moe import moe_layers, start_training, update_state
from vqmoe_vision.moe.config import check
from vqmoe_vision.moe.collect import summarize

from .class_names import check_class_names, check_zero_label
from .features import fit_features
from .finite import check_weights, pass_over_infinite
from .log import wrapped
from .model import unwrapped
from .progress import saves_after_iteration
from .routing import lines_of
from .stated_experts import check_experts

_ROUTING = 'routing_statistics'


def _check_repeated(runner: Runner) -> None:
    named = runner.cfg.get('activation_checkpointing')
    if not named:
        return
    layers = moe_layers(unwrapped(runner))
    allowed = 'modules without MoE layers, and none of their parts; grad_checkpointing takes those'
    for name in [named] if isinstance(named, str) else named:
        within = any(f'{layer}.'.startswith(f'{name}.') for layer in layers)
        parts = any(f'{name}.'.startswith(f'{layer}.') for layer in layers)
        check(not (within or parts), 'activation_checkpointing', name, allowed)


@HOOKS.register_module()
class MoeStateHook(Hook):
    """Moves the state that learns without gradients, and reports routing.

    Of a validation or test pass at its end; of training at the end of an epoch, or before the next
    validation.
    """

    # before EMAHook, whose averages have copies of what has moved
    priority = 'ABOVE_NORMAL'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Goes on with the routing of an epoch that a run resumes in its middle."""
        model = unwrapped(runner)
        if runner._resume and _ROUTING in checkpoint:  # a run of before has not kept it
            device = next(model.parameters()).device
            model.routing_statistics.load_state_dict(checkpoint[_ROUTING], device)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keeps the routing that no report has told yet, of this rank."""
        model = unwrapped(runner)
        if model.training:  # a validation that is cut off begins anew
            checkpoint[_ROUTING] = model.routing_statistics.state_dict()

    def before_train(self, runner: Runner) -> None:
        """Tells layers and model that a training begins.

        Raises:
            ValueError: As `fit_features`, or mmengine repeats what has auxiliary losses.
        """
        _check_repeated(runner)
        if not any(isinstance(hook, CheckpointFitHook) for hook in runner.hooks):
            fit_features(runner)  # which is first told there how images are normalised
        unwrapped(runner).state_is_moved = True
        batches_per_step = runner.optim_wrapper._accumulative_counts
        updates = math.ceil(runner.max_iters / batches_per_step)
        start_training(unwrapped(runner).routed_model, updates)

    def before_val_epoch(self, runner: Runner) -> None:
        """Reports the routing of the iterations since the last validation.

        A run that is counted in epochs has done so; one that is counted in iterations is a single
        epoch.
        """
        self._report(runner, 'train_epoch')

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Moves codebooks and the like, after a step of the optimizer.

        Where gradients accumulate, the batches of a step are one update.
        """
        if runner.optim_wrapper.should_update():
            update_state(unwrapped(runner).routed_model)

    def after_train_epoch(self, runner: Runner) -> None:
        """Reports the routing of the epoch."""
        self._report(runner, 'train_epoch')

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Reports the routing of the validation pass and adds it to the metrics."""
        assert metrics is not None
        metrics.update(self._report(runner, 'val'))

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Reports the routing of the test pass and adds it to the metrics."""
        assert metrics is not None
        metrics.update(self._report(runner, 'test'))

    def _report(self, runner: Runner, mode: str) -> dict[str, float]:
        statistics = unwrapped(runner).routing_statistics
        means = statistics.means()
        statistics.reset()
        summary = summarize(means)
        for line in lines_of(means):
            runner.logger.info(wrapped(f'{mode}  {line}'))
        scalars = {f'{mode}/{name}': value for name, value in summary.items()}
        if scalars and mode != 'test':
            runner.visualizer.add_scalars(scalars, step=runner.iter)
        return summary


@HOOKS.register_module()
class NonFiniteGuardHook(Hook):
    """Stops the run before a checkpoint with a nan or infinite parameter replaces a good one.

    Losses, and norms of gradients, are looked at by `StepValuesHook`. What is left is a finite loss
    with a gradient that is not, of which nobody computes the norm.
    """

    def before_run(self, runner: Runner) -> None:
        """Looks at what is not finite by design."""
        pass_over_infinite(unwrapped(runner))

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Looks at the parameters before the checkpoint of an iteration is due."""
        if any(saves_after_iteration(hook, runner) for hook in runner.hooks):
            check_weights(unwrapped(runner), runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        """Looks at the parameters before the checkpoint of the epoch is due."""
        check_weights(unwrapped(runner), runner.iter)  # counts the last one of the epoch already

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Looks at the parameters before they are written."""
        check_weights(unwrapped(runner), checkpoint['meta']['iter'], checkpoint['state_dict'])


@HOOKS.register_module()
class CheckpointFitHook(Hook):
    """Weights, the model that takes them and the images that it is fed with have to fit.

    mmengine would warn of a checkpoint that does not fit the model, and go on. Images are
    normalised as the weights want it, before the first of them is read; then what decides by images
    is fitted to them.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compares names and shapes, and experts with those that the checkpoint says it has.

        Raises:
            ValueError: Names the keys and shapes that do not fit, or another method; or the run
                averages its weights, and what goes on does not, or the other way round.
        """
        averages = any(isinstance(hook, EMAHook) for hook in runner.hooks)
        if runner._resume and ('ema_state_dict' in checkpoint) != averages:
            what = 'has averages of its weights, and these options have no EMAHook'
            if averages:
                what = 'has no averages of its weights, and these options have an EMAHook'
            raise ValueError(f'the run {what}: go on with the options that it began with')
        loaded = checkpoint.get('state_dict', checkpoint)
        path = os.path.expanduser(str(runner._load_from))
        check_experts(unwrapped(runner).routed_model, path, checkpoint)
        problem = unwrapped(runner).misfit(loaded)
        if problem:
            raise ValueError(f'the checkpoint does not fit the model: {problem}')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Says as plain values what whoever loads the weights has to know of their run."""
        model = unwrapped(runner)
        network, known = model.routed_model, model.known_normalization
        size = getattr(getattr(network, 'patch_embed', None), 'img_size', None)
        checkpoint['meta'][STATED] = {
            **state_experts(network),
            'img_size': size and list(size),
            'mean': known and known.mean,
            'std': known and known.std,
            'classes': runner.train_dataloader.dataset.metainfo.get('classes'),
        }

    def before_train(self, runner: Runner) -> None:
        """Normalises images of training and validation, and fits what reads them.

        Raises:
            ValueError: The config states another normalisation than that of the weights, or how
                experts are made of dense weights without naming such weights; or as `fit_features`.
        """
        if not runner._resume:  # the weights of its run are all that it needs
            check_upcycled(unwrapped(runner).routed_model)
        self._normalize(runner, ('train',) if runner.val_loop is None else ('train', 'val'))
        fit_features(runner)

    def before_val(self, runner: Runner) -> None:
        """As `before_train`, for a validation without a training."""
        self._normalize(runner, ('val',))

    def before_test(self, runner: Runner) -> None:
        """As `before_train`, for images of a test."""
        self._normalize(runner, ('test',))

    @staticmethod
    def _normalize(runner: Runner, splits: Sequence[str]) -> None:
        loaders = [f'{split}_dataloader' for split in splits]
        datasets = {f'{name}.dataset': getattr(runner, name).dataset for name in loaders}
        unwrapped(runner).normalize_inputs(datasets)


@HOOKS.register_module()
class ClassCountHook(Hook):
    """Compares the classes of the model, of the data sets and of a checkpoint before a run.

    Raises:
        ValueError: The model has another number of classes than a data set, or the training and
            validation sets, or the data and the run that is tested or resumed, have different
            classes, or count them from another label on.
    """

    def __init__(self) -> None:
        self._content: dict[str, Any] = {}
        self._resumed = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keeps what the checkpoint says of its classes."""
        self._content, self._resumed = {'meta': checkpoint.get('meta')}, runner._resume

    def before_train(self, runner: Runner) -> None:
        """Checks the training set, and that validation numbers the classes in the same way."""
        seen = self._check(runner, 'train')
        if not self._resumed:  # another task may start from the weights
            self._content = {}
        else:
            check_class_names(self._content, seen, 'train_dataloader.dataset')
            self._check_zero_label(runner, 'train')
        if runner.val_loop is not None:
            held_out = self._check(runner, 'val')
            metainfo = runner.train_dataloader.dataset.metainfo
            check_zero_label(runner, 'val', metainfo, 'train_dataloader.dataset')
            if seen != held_out:
                differ = sorted(set(seen) ^ set(held_out))
                raise ValueError(
                    'the training and validation sets have different classes: '
                    f'only one of them has {", ".join(differ[:5])}'
                    if differ
                    else 'the training and validation sets have their classes in different orders'
                )

    def before_test(self, runner: Runner) -> None:
        """Checks the test set, and that it numbers the classes as the training did."""
        classes = self._check(runner, 'test')
        check_class_names(self._content, classes, 'test_dataloader.dataset')
        self._check_zero_label(runner, 'test')

    def _check_zero_label(self, runner: Runner, split: str) -> None:
        meta = self._content.get('meta')
        trained = meta.get('dataset_meta') if isinstance(meta, dict) else None
        check_zero_label(runner, split, trained, 'the training of the checkpoint')

    @staticmethod
    def _check(runner: Runner, split: str) -> tuple[str, ...]:
        loader = f'{split}_dataloader'
        classes = tuple(getattr(runner, loader).dataset.metainfo.get('classes', ()))
        if not classes:
            raise ValueError(f'{loader}.dataset has no classes; metainfo=dict(classes=...)')
        model = unwrapped(runner)
        if len(classes) != model.num_classes:
            head = 'decode_head.' if hasattr(model, 'decode_head') else ''
            raise ValueError(
                f'model.{head}num_classes={model.num_classes}, but the data set has {len(classes)} '
                f'classes ({", ".join(classes[:3])}, ...) in {loader}'
            )
        return classes
