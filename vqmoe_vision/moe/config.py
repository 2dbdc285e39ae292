"""Options that every mixture-of-experts method shares, and the checks behind them.

A method's options are a frozen dataclass, whose fields are keyword arguments of
`timm.create_model`. One that a method does not have is unknown (`TypeError`), never ignored.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from numbers import Integral, Real
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)
from weakref import WeakKeyDictionary

from .joint_losses import Loss, values_of

if TYPE_CHECKING:
    from typing_extensions import Self

LONGEST_VALUE = 500  # letters of it that a message has


def check(valid: bool, field: str, value: object, allowed: str) -> None:
    """Refuse a user's value in one line: `ValueError` with field, value and what is allowed."""
    if not valid:
        shown = repr(value).replace('\n', ' ')
        if len(shown) > LONGEST_VALUE:  # such as all weights of a model
            shown = f'{shown[:LONGEST_VALUE]}...'
        raise ValueError(f'{field}={shown} is not possible: {allowed}')


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to put behind a user's unknown name: the known one most like it; empty if none is."""
    nearest = get_close_matches(name, sorted(known), 1)
    return f'; did you mean {nearest[0]}?' if nearest else ''


# mypy takes a dataclass itself for not hashable, so that functools.cache has no types here
_TYPES: WeakKeyDictionary[type, Mapping[str, Any]] = WeakKeyDictionary()


def types_of(kind: type) -> Mapping[str, Any]:
    """The types of the fields of a dataclass."""
    if kind not in _TYPES:
        # kept: Python compiles all annotations at each call
        _TYPES[kind] = get_type_hints(kind)
    return _TYPES[kind]


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Options of every MoE layer.

    Args:
        num_experts: E, at least 1.
        expert_mlp_ratio: Hidden width of an expert over D, above 0 and at most 1000; None takes the
            dense blocks' `mlp_ratio`.

    Raises:
        ValueError: A field holds an impossible value.
    """

    # 'matched' has the compute of two experts per token, as every row of our comparisons
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {'paper': {}, 'matched': {}}
    # Options by name that run other code than the presets; tests of every kind try them, and each
    # option has to be in one of them.
    TRIALS: ClassVar[dict[str, dict[str, Any]]] = {}
    # Options by name with which a layer of equal experts answers as one of them alone: a model that
    # starts from a dense one then begins with its answers. Empty where no options do so; a method
    # that needs none has an entry without options.
    EXACT_UPCYCLING: ClassVar[dict[str, dict[str, Any]]] = {}
    # Options of a class that trained weights need not be used with: the answers of a model do not
    # follow them, as those of losses, or tensors show them.
    NOT_OF_WEIGHTS: ClassVar[frozenset[str]] = frozenset({'num_experts', 'expert_mlp_ratio'})

    num_experts: int = 8
    expert_mlp_ratio: float | None = None

    def __post_init__(self) -> None:
        types = types_of(type(self))
        for field in fields(self):
            check_type(field.name, types[field.name], getattr(self, field.name))
        self.require('num_experts', self.num_experts >= 1, 'at least 1')
        ratio = self.expert_mlp_ratio
        possible = ratio is None or 0 < ratio <= 1000
        self.require('expert_mlp_ratio', possible, 'above 0 and at most 1000, or None')

    @classmethod
    def option_names(cls) -> set[str]:
        """Names that a user may pass, `preset` included."""
        return {field.name for field in fields(cls)} | {'preset'}

    @classmethod
    def from_options(cls, preset: str | None = None, **options: Any) -> Self:
        """Build from a named preset with single options on top.

        Args:
            preset: Key of `PRESETS`; None has the defaults of the fields.
            **options: Fields; they win over the preset.

        Raises:
            ValueError: Unknown preset, impossible value, or option without effect.
            TypeError: An option that the method does not have.
        """
        config = cls._of_preset(preset, options)
        for name, hint in types_of(cls).items():
            _check_size(name, hint, getattr(config, name))
        for name, reason in config.unused().items():
            check(name not in options, name, options.get(name), f'it has no effect with {reason}')
        return config

    @classmethod
    def without_effect(cls, preset: str | None = None, **options: Any) -> set[str]:
        """Names of the options that `from_options` would refuse for having no effect.

        Args:
            preset: Key of `PRESETS`, or None.
            **options: Fields.

        Raises:
            ValueError: Unknown preset, or impossible value.
            TypeError: An option that the method does not have.
        """
        return cls._of_preset(preset, options).unused().keys() & options.keys()

    @classmethod
    def _of_preset(cls, preset: str | None, options: dict[str, Any]) -> Self:
        if preset is None:
            return cls(**options)
        known = isinstance(preset, str) and preset in cls.PRESETS
        check(known, 'preset', preset, f'one of {sorted(cls.PRESETS)}')
        return cls(**{**cls.PRESETS[preset], **options})

    def require(self, name: str, valid: bool, allowed: str) -> None:
        """Refuse the value of a field in one line.

        Args:
            name: Of the field.
            valid: Whether its value is possible.
            allowed: What is possible, in words.

        Raises:
            ValueError: It is not.
        """
        check(valid, name, getattr(self, name), allowed)

    def unused(self) -> dict[str, str]:
        """Options without effect, and the value that leaves them so; giving one is an error."""
        return {}

    @property
    def learns_routing(self) -> bool:
        """Whether what sends tokens to experts is learned; a method that does not is a control."""
        return True

    def of_weights(self) -> set[str]:
        """Options that say, beside tensors, what the answers of a model are."""
        left_out: set[str] = set()
        for kind in type(self).__mro__:
            left_out |= kind.__dict__.get('NOT_OF_WEIGHTS', frozenset())
        return {field.name for field in fields(self)} - left_out


@dataclass(frozen=True, kw_only=True)
class TopKConfig(MoeConfig):
    """Options of methods that send a token to its `top_k` best experts, from 1 to `num_experts`."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {'paper': {}, 'matched': {'top_k': 2}}

    top_k: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            'top_k',
            1 <= self.top_k <= self.num_experts,
            f'between 1 and num_experts={self.num_experts}',
        )


@dataclass(frozen=True, kw_only=True)
class BalancedConfig(MoeConfig):
    """Options of methods with a balance loss.

    With `global_balance` it is over the tokens of all processes, without it the mean of each one's.
    """

    NOT_OF_WEIGHTS: ClassVar[frozenset[str]] = frozenset({'global_balance'})

    global_balance: bool = True

    def balanced(self, terms: dict[str, Loss]) -> dict[str, Loss]:
        """Losses by name, of this process's tokens alone without `global_balance`."""
        return terms if self.global_balance else {**values_of(terms)}


def check_renormalize(renormalize: bool, top_k: int) -> None:
    """Refuse the combination in which every weight is 1, so that a router learns nothing."""
    check(
        not (renormalize and top_k == 1),
        'renormalize',
        renormalize,
        'False when top_k=1, else every weight is 1 and the router gets no gradient',
    )


def check_type(name: str, hint: Any, value: object) -> None:
    """Refuse a value of another type: numbers, `Literal`, tuples, callables or unions of these."""
    check(_has_type(value, hint), name, value, f'{inspect.formatannotation(hint)} is expected')


def _check_size(name: str, hint: Any, value: Any) -> None:
    """Refuse numbers that float32 or a shape cannot hold, of options that do not say it closer."""
    kinds = get_args(hint) or (hint,)
    if value is None:
        return
    if float in kinds:
        size = abs(float(value))
        check(size == 0 or 1e-30 <= size <= 1e30, name, value, 'from 1e-30 to 1e30 in size')
    elif int in kinds:
        check(value < 2**31, name, value, 'below 2**31')


def _has_type(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_has_type(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:  # a config may have it as a list
        listed = isinstance(value, list | tuple) and len(value) == len(parts)
        return listed and all(map(_has_type, value, parts))
    if hint is Callable or origin in (type, Callable):
        return callable(value)
    # bool is an int to Python, but no number of experts
    confused = isinstance(value, bool) and hint is not bool
    if hint is float and isinstance(value, Integral) and abs(int(value)) > sys.float_info.max:
        return False
    return isinstance(value, {int: Integral, float: Real}.get(hint, hint)) and not confused


def check_weights(config: MoeConfig, *names: str) -> None:
    """Refuse loss weights that are negative or not finite."""
    for name in names:
        value = getattr(config, name)
        check(value >= 0 and math.isfinite(value), name, value, 'at least 0 and finite')
