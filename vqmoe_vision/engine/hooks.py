"""Hooks for models with MoE layers, used by classification and segmentation alike."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import product, zip_longest
from operator import attrgetter
from typing import Any

import torch
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from torch import nn

from vqmoe_vision.models.compat import STATED, state_network, stated_in
from vqmoe_vision.models.create import check_upcycled
from vqmoe_vision.moe import moe_layers, start_training, update_state
from vqmoe_vision.moe.collect import describe, summarize
from vqmoe_vision.moe.config import check
from vqmoe_vision.moe.optimizer import mixes_experts, per_expert
from vqmoe_vision.moe.raw_patches import image_reader

from .config import innermost
from .images import TrainingPart
from .model import MoeTrainingMixin, check_experts, unwrapped
from .optim import with_kernels
from .seeding import ReseedHook
from .step_values import check_weights, pass_over_infinite

_ROUTING = 'routing_statistics'


def _fit_reader(runner: Runner) -> None:
    if (reader := image_reader(unwrapped(runner).routed_model)) is not None:
        reader.before_training(runner)


def lines_of(means: dict[str, torch.Tensor]) -> list[str]:
    """One line per layer: `blocks.1.mlp load 0.083..0.172 perplexity 7.71 unused 0/8`."""
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in means.items():
        layer, _, kind = name.rpartition('/')
        by_layer.setdefault(layer, {})[kind] = value
    return [f'{layer}  {describe(stats)}' for layer, stats in by_layer.items()]


@HOOKS.register_module()
class MoeStateHook(Hook):
    """Moves the state that learns without gradients, and reports routing.

    Of a validation or test pass at its end; of training at the end of an epoch, or before the next
    validation.
    """

    # before EMAHook, whose averages have copies of what has moved
    priority = 'ABOVE_NORMAL'

    def before_run(self, runner: Runner) -> None:
        """Teaches optimizers that look at a tensor as a whole, before their state is loaded."""
        wrapper = runner.optim_wrapper  # a test has none
        if isinstance(wrapper, OptimWrapper) and mixes_experts(wrapper.optimizer):
            per_expert(wrapper.optimizer, unwrapped(runner))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Goes on with the routing of an epoch that a run resumes in its middle."""
        model = unwrapped(runner)
        if runner._resume and _ROUTING in checkpoint:  # a save after a validation has none
            device = next(model.parameters()).device
            model.routing_statistics.load_state_dict(checkpoint[_ROUTING], device)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keeps the routing that no report has told yet, of this rank."""
        model = unwrapped(runner)
        if model.training:  # a validation that is cut off begins anew
            checkpoint[_ROUTING] = model.routing_statistics.state_dict()

    def before_train(self, runner: Runner) -> None:
        """Tells layers and model that a training begins."""
        named = runner.cfg.get('activation_checkpointing') or []
        allowed = 'no part of a MoE layer, and without one: grad_checkpointing takes those'
        for name in [named] if isinstance(named, str) else named:
            for layer in moe_layers(unwrapped(runner)):
                inside = f'{layer}.'.startswith(f'{name}.') or f'{name}.'.startswith(f'{layer}.')
                check(not inside, 'activation_checkpointing', name, allowed)
        if not any(isinstance(hook, CheckpointFitHook) for hook in runner.hooks):
            _fit_reader(runner)  # which is first told there how images are normalised
        unwrapped(runner).state_is_moved = True
        updates = math.ceil(runner.max_iters / runner.optim_wrapper._accumulative_counts)
        start_training(unwrapped(runner).routed_model, updates)

    def before_val_epoch(self, runner: Runner) -> None:
        """Reports the routing since the last validation; a run by iterations is a single epoch."""
        self._report(runner, 'train_epoch')

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Moves codebooks and the like, once a step of the optimizer, however many its batches."""
        if runner.optim_wrapper.should_update():
            update_state(unwrapped(runner).routed_model)

    after_train_epoch = before_val_epoch

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        """Reports the routing of the validation pass and adds it to the metrics."""
        metrics.update(self._report(runner, 'val'))

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        """Reports the routing of the test pass and adds it to the metrics."""
        metrics.update(self._report(runner, 'test'))

    def _report(self, runner: Runner, mode: str) -> dict[str, float]:
        means = unwrapped(runner).routing_statistics.means()
        unwrapped(runner).routing_statistics.reset()
        summary = summarize(means)
        for line in lines_of(means):
            runner.logger.info(f'{mode}  {line}')
        if summary and mode != 'test':
            scalars = {f'{mode}/{name}': value for name, value in summary.items()}
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

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Looks at the parameters before they are written."""
        check_weights(unwrapped(runner), checkpoint['meta']['iter'], checkpoint['state_dict'])


@HOOKS.register_module()
class CheckpointFitHook(Hook):
    """Refuses weights that do not fit the model, and normalises images as they want it."""

    _trains = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compares names and shapes, and experts with those that the checkpoint says it has."""
        averages = any(isinstance(hook, EMAHook) for hook in runner.hooks)
        same = not runner._resume or ('ema_state_dict' in checkpoint) == averages
        check(same, 'EMAHook', averages, f'{not averages}, as when the run began that is resumed')
        # kernels are the config's and the card's that it goes on with
        if runner._resume and 'optimizer' in checkpoint:
            with_kernels(checkpoint['optimizer'], runner.optim_wrapper.optimizer)
        path = os.path.expanduser(str(runner._load_from))
        check_experts(unwrapped(runner).routed_model, path, checkpoint, runner._resume)
        unwrapped(runner).check_state_dict(checkpoint.get('state_dict', checkpoint), path)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Says as plain values what whoever loads the weights has to know of their run."""
        model = unwrapped(runner)
        network, known = model.routed_model, model.known_normalization
        checkpoint['meta'][STATED] = {
            **state_network(network),
            'mean': known and known.mean,
            'std': known and known.std,
            'classes': runner.train_dataloader.dataset.metainfo.get('classes'),
        }

    def before_train(self, runner: Runner) -> None:
        """Normalises images of training and validation, and fits what reads them."""
        if not runner._resume:  # the weights of its run are all that it needs
            check_upcycled(unwrapped(runner).routed_model)
        self._normalize(runner, ('train',) if runner.val_loop is None else ('train', 'val'))
        self._trains = True
        _fit_reader(runner)

    def before_val(self, runner: Runner) -> None:
        """As `before_train`, for a validation without a training."""
        if not self._trains:
            self._normalize(runner, ('val',))

    def before_test(self, runner: Runner) -> None:
        """As `before_train`, for images of a test."""
        self._normalize(runner, ('test',))

    @staticmethod
    def _normalize(runner: Runner, splits: Sequence[str]) -> None:
        fields = [f'{split}_dataloader.dataset' for split in splits]
        unwrapped(runner).normalize_inputs({name: attrgetter(name)(runner) for name in fields})


@HOOKS.register_module()
class ClassCountHook(Hook):
    """Compares the classes of the model, of the data sets and of a checkpoint before a run.

    Raises:
        ValueError: Their number, names or order differ, or the label that they are counted from.
    """

    _meta: Any = None
    _resumed = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keeps what the checkpoint says of its classes."""
        self._meta, self._resumed = checkpoint.get('meta'), runner._resume

    def before_train(self, runner: Runner) -> None:
        """Checks the training set, and that validation numbers the classes in the same way."""
        seen = self._check(runner, 'train')
        if not self._resumed:  # another task may start from the weights
            self._meta = None
        self._compare(runner, 'train', seen)
        held_out = seen
        if runner.val_loop is not None:
            held_out = self._check(runner, 'val')
            metainfo = runner.train_dataloader.dataset.metainfo
            check_zero_label(runner, 'val', metainfo, 'train_dataloader.dataset')
        differing = sorted(set(seen) ^ set(held_out))[:5] or 'another order'
        allowed = 'those of train_dataloader.dataset'
        check(seen == held_out, 'val_dataloader.dataset.classes', differing, allowed)

    def before_test(self, runner: Runner) -> None:
        """Checks the test set, and that it numbers the classes as the training did."""
        self._compare(runner, 'test', self._check(runner, 'test'))

    def _compare(self, runner: Runner, split: str, classes: tuple[str, ...]) -> None:
        check_class_names({'meta': self._meta}, classes, f'{split}_dataloader.dataset')
        trained = self._meta.get('dataset_meta') if isinstance(self._meta, dict) else None
        check_zero_label(runner, split, trained, 'the training of the checkpoint')

    @staticmethod
    def _check(runner: Runner, split: str) -> tuple[str, ...]:
        loader = f'{split}_dataloader'
        classes = tuple(getattr(runner, loader).dataset.metainfo.get('classes', ()))
        check(bool(classes), f'{loader}.dataset.classes', classes, 'there, metainfo has them')
        model = unwrapped(runner)
        field = f'model.{"decode_head." if hasattr(model, "decode_head") else ""}num_classes'
        allowed = (
            f'{len(classes)}, the number of classes in {loader}: {", ".join(classes[:3])}, ...'
        )
        check(len(classes) == model.num_classes, field, model.num_classes, allowed)
        return classes


@MODELS.register_module()
class JointMovingAverage(ExponentialMovingAverage):
    """mmengine's, equal to the bit, in one operator for all tensors: a card has one launch.

    Args:
        *args: As mmengine's.
        **options: As mmengine's: `momentum`, `interval`, `update_buffers`.
    """

    def update_parameters(self, model: nn.Module) -> None:
        """Moves the averages."""
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        super().update_parameters(model)
        if self._pairs:
            averages, values = zip(*self._pairs, strict=True)
            torch._foreach_lerp_(averages, values, self.momentum)
        del self._pairs  # a model that is copied or pickled takes no tensors along

    def avg_func(self, averaged_param: Any, source_param: Any, steps: Any) -> None:
        """Keeps a pair until all are there."""
        self._pairs.append((averaged_param, source_param))


def check_hooks(runner: Runner) -> None:
    """Refuses a training without the hooks that every config of this package has."""
    if not isinstance(unwrapped(runner), MoeTrainingMixin):
        return
    kinds = (ReseedHook, CheckpointFitHook, NonFiniteGuardHook, MoeStateHook, ClassCountHook)
    missing = [k.__name__ for k in kinds if not any(isinstance(h, k) for h in runner.hooks)]
    listed = [hook['type'] for hook in runner.cfg.get('custom_hooks') or []]
    allowed = (
        f'it lacks {", ".join(missing)} of configs/_base_/default_runtime.py, as a list replaces '
        'that of a base: hooks of your own go under default_hooks.NAME'
    )
    check(not missing, 'custom_hooks', listed, allowed)
    # in the order in which they are called: averages have copies of what has moved, and are saved
    ordered = list(enumerate((MoeStateHook, EMAHook, CheckpointHook)))
    called = [n for hook in runner.hooks for n, kind in ordered if isinstance(hook, kind)]
    allowed = "after MoeStateHook and before the checkpoint hook: leave it at 'NORMAL'"
    for hook in runner.hooks:
        fits = not isinstance(hook, EMAHook) or called == sorted(called)
        check(fits, 'EMAHook.priority', hook.priority, allowed)


def check_training_data(runner: Runner) -> None:
    """Refuses data that a training would misuse, or stop at."""
    if runner.val_loop is not None:
        check_held_out(runner.train_dataloader.dataset, runner.val_dataloader.dataset)
    if isinstance(model := unwrapped(runner), MoeTrainingMixin):
        model.check_batches(runner.train_dataloader)


def check_zero_label(runner: Runner, split: str, trained: Any, whose: str) -> None:
    """Compares whether label 0 is nothing that is learned, and label 1 the first class."""
    loaders = ('train_dataloader', f'{split}_dataloader')
    now = getattr(runner, loaders[1]).dataset.metainfo.get('reduce_zero_label')
    before = (trained or {}).get('reduce_zero_label')
    if now is None or before is None or now == before:
        return
    # of data of one kind: files of others may be written otherwise
    datasets = [(runner.cfg.get(loader) or {}).get('dataset') or {} for loader in loaders]
    kinds = [{(part.get('type'), part.get('data_root')) for part in innermost(d)} for d in datasets]
    allowed = f'{before}, as in {whose}, or every class would be that of another label'
    same = not datasets[0] or (len(kinds[0]) == 1 and kinds[0] == kinds[1])
    check(not same, f'{loaders[1]}.dataset.reduce_zero_label', now, allowed)


def check_held_out(trained: Any, validated: Any) -> None:
    """Whoever trains on all images, both parts, means it; docs/how-to/data.md says what for."""
    for part, other in product(_parts(validated), _parts(trained)):
        if {part.name, other.name} == {'train', 'dev'} and part.source == other.source:
            allowed = f'{other.dev_size}, as of the same images in train_dataloader.dataset'
            same = part.dev_size == other.dev_size
            check(same, 'val_dataloader.dataset.dev_size', part.dev_size, allowed)


def _parts(dataset: Any) -> Iterator[TrainingPart]:
    if (part := getattr(dataset, 'training_part', None)) is not None:
        yield part
    for inner in (getattr(dataset, 'dataset', None), *(getattr(dataset, 'datasets', None) or [])):
        if inner is not None:
            yield from _parts(inner)


def check_class_names(content: Any, classes: Iterable[Any], where: str) -> None:
    """Compares names of classes, by which a label is a class, with those of a checkpoint."""
    trained = stated_in(content).get('classes')
    if not isinstance(trained, list | tuple):
        return
    for index, (before, now) in enumerate(zip_longest(map(str, trained), map(str, classes))):
        if before != now:
            raise ValueError(
                f'the checkpoint was trained with other classes: its class {index} is {before!r}, '
                f'that of {where} is {now!r}; give the classes the names of the training, in its '
                'order'
            )
