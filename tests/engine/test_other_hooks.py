"""Options of averages and of early stopping that are impossible, which mmengine says in Python."""

from typing import Any

import pytest
from mmengine.hooks import EarlyStoppingHook, EMAHook
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import HOOKS

import vqmoe_vision.engine  # noqa: F401  puts the hooks in the place of mmengine's

EMA = dict(type='EMAHook')
EARLY = dict(type='EarlyStoppingHook')


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (EMA | dict(momentum=2), 'momentum=2 is not possible: above 0 and below 1'),
        (EMA | dict(momentum='abc'), "momentum='abc' is not possible: above 0"),
        (EMA | dict(momentum=0.0), 'momentum=0.0 is not possible: above 0'),
        (EMA | dict(ema_type='EMA'), "ema_type='EMA' is not possible: one of Expon"),
        (EMA | dict(gamma=2), 'gamma=2 is not possible: the options are begin_epoch, begin_iter, '),
        (EMA | dict(momentun=0.1), 'strict_load, update_buffers; did you mean momentum?'),
        (EMA | dict(ema_type='StochasticWeightAverage', momentum=0.1), 'momentum=0.1 is not possi'),
        (EMA | dict(begin_iter=-1), 'begin_iter=-1 is not possible: a whole number, at least 0'),
        (EMA | dict(begin_iter=2, begin_epoch=1), 'begin_iter=2 is not possible: 0 with begin_epo'),
        (EARLY, "monitor=None is not possible: a metric of the validation, such as 'acc"),
        (EARLY | dict(monitor='mIoU', patient=2), 'strict; did you mean patience?'),
    ],
)
def test_an_impossible_option_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        HOOKS.build(config)
    assert str(caught.value).startswith(config['type']) and message in str(caught.value)


class Own(ExponentialMovingAverage):
    """Hands on what it does not know."""

    def __init__(self, *args: Any, power: int = 1, **others: Any) -> None:
        super().__init__(*args, **others)


def test_a_class_of_averages_may_be_a_user_s_own_and_named_with_its_scope() -> None:
    for kind in ('mmengine.ExponentialMovingAverage', ExponentialMovingAverage, Own):
        assert isinstance(HOOKS.build(EMA | dict(ema_type=kind, momentum=0.1)), EMAHook)
    assert isinstance(HOOKS.build(EMA | dict(ema_type=Own, power=2)), EMAHook)
    with pytest.raises(ValueError, match=r'^EMAHook\.others=2 is not possible'):
        HOOKS.build(EMA | dict(ema_type=Own, others=2))
    with pytest.raises(ValueError, match='ema_type=<class'):
        HOOKS.build(EMA | dict(ema_type=dict))


def test_options_of_mmengine_are_taken() -> None:
    momentum = dict(ema_type='MomentumAnnealingEMA', momentum=0.1, gamma=10, begin_epoch=1)
    assert isinstance(HOOKS.build(EMA | momentum), EMAHook)
    hook: Any = HOOKS.build(EARLY | dict(monitor='mIoU', patience=2, strict=True))
    assert isinstance(hook, EarlyStoppingHook) and (hook.patience, hook.rule) == (2, 'greater')


def test_a_metric_that_the_validation_has_not_is_refused_at_the_first() -> None:
    hook: Any = HOOKS.build(EARLY | dict(monitor='accuracy/top2'))
    message = r"^EarlyStoppingHook\.monitor='accuracy/top2' is not possible: .* are accuracy/top1$"
    with pytest.raises(ValueError, match=message):
        hook.after_val_epoch(None, {'accuracy/top1': 50.0})
