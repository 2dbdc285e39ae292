"""mmengine's hooks for averages and for early stopping, whose options are checked in words."""

from typing import Any

from mmengine.hooks import EarlyStoppingHook, EMAHook
from mmengine.model import BaseAveragedModel, ExponentialMovingAverage
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner

from vqmoe_vision.moe.config import check, did_you_mean

from .class_arguments import arguments_of, check_arguments
from .reported import check_reported

_OF_AVERAGES = 'EMAHook'
_OF_STOPPING = 'EarlyStoppingHook'


def _averages(ema_type: Any) -> type[BaseAveragedModel]:
    """The class that mmengine would build."""
    kind = ema_type
    if isinstance(ema_type, str):
        with MODELS.switch_scope_and_registry(None) as registry:
            kind = registry.get(ema_type)
    kinds = [
        name
        for name, known in MODELS.module_dict.items()
        if isinstance(known, type) and issubclass(known, BaseAveragedModel)
    ]
    allowed = f'one of {", ".join(sorted(kinds))}{did_you_mean(str(ema_type), kinds)}'
    possible = isinstance(kind, type) and issubclass(kind, BaseAveragedModel)
    check(possible, f'{_OF_AVERAGES}.ema_type', ema_type, allowed)
    return kind


@HOOKS.register_module(_OF_AVERAGES, force=True)
class CheckedEMAHook(EMAHook):
    """mmengine's hook, which ends in Python's words where an option is impossible.

    It takes the name of mmengine's, so that every config that imports this package has it.

    Args:
        ema_type: Name of a class of averages, or the class.
        **options: As mmengine's, and those of the class.

    Raises:
        ValueError: An option is unknown or impossible.
    """

    def __init__(self, ema_type: Any = 'ExponentialMovingAverage', **options: Any) -> None:
        kind = _averages(ema_type)
        known = {**arguments_of(EMAHook), **arguments_of(kind)}.keys() - {'model'}
        check_arguments(_OF_AVERAGES, options, known)
        if issubclass(kind, ExponentialMovingAverage) and 'momentum' in options:
            momentum = options['momentum']
            possible = isinstance(momentum, int | float) and 0 < momentum < 1
            check(possible, f'{_OF_AVERAGES}.momentum', momentum, 'above 0 and below 1')
        begins = {name: options.get(name, 0) for name in ('begin_iter', 'begin_epoch')}
        for name, value in begins.items():
            possible = type(value) is int and value >= 0
            check(possible, f'{_OF_AVERAGES}.{name}', value, 'a whole number, at least 0')
        allowed = f'0 with begin_epoch={begins["begin_epoch"]}'
        both = all(begins.values())
        check(not both, f'{_OF_AVERAGES}.begin_iter', begins['begin_iter'], allowed)
        super().__init__(ema_type, **options)


@HOOKS.register_module(_OF_STOPPING, force=True)
class CheckedEarlyStoppingHook(EarlyStoppingHook):
    """mmengine's hook, which passes over a metric that the validation has not, and never stops.

    It takes the name of mmengine's, so that every config that imports this package has it.

    Args:
        monitor: A metric of the validation.
        **options: As mmengine's.

    Raises:
        ValueError: There is no metric, or the validation has not this one.
    """

    def __init__(self, monitor: str | None = None, **options: Any) -> None:
        allowed = "a metric of the validation, such as 'accuracy/top1' or 'mIoU'"
        check(isinstance(monitor, str), f'{_OF_STOPPING}.monitor', monitor, allowed)
        check_arguments(_OF_STOPPING, options, arguments_of(EarlyStoppingHook))
        super().__init__(monitor, **options)

    def before_train(self, runner: Runner) -> None:
        """Looks for the metric before there is a validation, as far as that is known."""
        check_reported(runner, f'{_OF_STOPPING}.monitor', self.monitor)
        super().before_train(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Decides whether the training ends."""
        assert metrics is not None
        allowed = f'a metric of the validation, which are {", ".join(metrics)}'
        check(self.monitor in metrics, f'{_OF_STOPPING}.monitor', self.monitor, allowed)
        super().after_val_epoch(runner, metrics)
