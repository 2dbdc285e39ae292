"""Options that every method shares, and the checks behind them.

A method's options are a frozen dataclass, whose fields are keyword arguments of
`timm.create_model`. What is to be known of an option stands on its field.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from numbers import Integral, Real
from operator import ge, gt, le, lt
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from typing_extensions import override

Named = dict[str, dict]
Config = TypeVar('Config', bound='MoeConfig')


def check(valid: bool, field: str, value: object, allowed: str) -> None:
    """Refuse a user's value in one line: `ValueError` with field, value and what is allowed."""
    if not valid:
        shown = repr(value).replace('\n', ' ')
        if len(shown) > 500:  # such as all weights of a model
            shown = f'{shown[:500]}...'
        raise ValueError(f'{field}={shown} is not possible: {allowed}')


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to put behind a user's unknown name: the known one most like it; empty if none is."""
    nearest = get_close_matches(name, sorted(known), 1)
    return f'; did you mean {nearest[0]}?' if nearest else ''


def option(
    default: Any,
    *trials: Any,
    bounds: str = '',
    of_weights: bool = True,
    idle: dict | None = None,
    balances: bool = False,
) -> Any:
    """A field of options, and what is to be known of it.

    Args:
        default: Its value where none is given.
        *trials: Other values that run other code, for tests; a dictionary combines options.
        bounds: Of a number that is not None, such as '[0, 1)': at least 0 and below 1.
        of_weights: False where trained weights need not be used with it, or tensors show it.
        idle: Other options, and a value of each (several as a tuple, or a function of it) that
            leaves this one without effect. Giving it then is an error.
        balances: Whether it is the weight of a loss that balances tokens.
    """
    facts = dict(bounds=bounds, of_weights=of_weights, idle=idle or {}, balances=balances)
    return field(default=default, metadata={'trials': trials, **facts})


def loss_weight(default: float, *trials: Any, **facts: Any) -> Any:
    """An `option` that is the weight of a loss."""
    return option(default, *trials, bounds='[0, inf)', of_weights=False, **facts)


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Options of every MoE layer; `bounds` of a field says which numbers it takes.

    Args:
        num_experts: E, the experts of a layer.
        expert_mlp_ratio: Hidden width of an expert over D; None takes the dense `mlp_ratio`.
        recompute: 'gelu' computes GELU again in the backward pass, to keep less until then; for
            experts with GELU, and without gate, norm and dropout.

    Raises:
        ValueError: A field holds an impossible value.
    """

    # 'matched' has the compute of two experts per token, as every row of our comparisons
    PRESETS: ClassVar[Named] = {'paper': {}, 'matched': {}}
    # Presets that were meant by a call with a preset, or with none, before defaults changed.
    FORMER_PRESETS: ClassVar[dict[str | None, str]] = {}
    # Options by name with which a layer of equal experts answers as one of them alone, so that a
    # model that starts from a dense one begins with its answers; empty where none do so.
    EXACT_UPCYCLING: ClassVar[Named] = {}

    num_experts: int = option(8, bounds='[1, inf)', of_weights=False)
    expert_mlp_ratio: float | None = option(None, bounds='(0, 1000]', of_weights=False)
    recompute: Literal['gelu'] | None = option(None, 'gelu', of_weights=False)

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for each in fields(self):
            value, bounds = getattr(self, each.name), each.metadata['bounds']
            check_type(each.name, types[each.name], value)
            if bounds and value is not None:
                self.require(each.name, *_within(value, bounds))

    @classmethod
    def option_names(cls) -> set[str]:
        """Names that a user may pass, `preset` included."""
        return {each.name for each in fields(cls)} | {'preset'}

    @classmethod
    def from_options(cls: type[Config], preset: str | None = None, **options: Any) -> Config:
        """Build from a named preset with single options on top.

        Args:
            preset: Key of `PRESETS`; None has the defaults of the fields.
            **options: Fields; they win over the preset.

        Raises:
            ValueError: Unknown preset, impossible value, or option without effect.
            TypeError: An option that the method does not have.
        """
        config = cls.of_preset(preset, **options)
        for name, reason in config.unused().items():
            check(name not in options, name, options.get(name), f'it has no effect with {reason}')
        return config

    @classmethod
    def of_preset(cls: type[Config], preset: str | None = None, **options: Any) -> Config:
        """As `from_options`, and options without effect are passed over.

        Args:
            preset: As there.
            **options: As there.
        """
        check(preset in (None, *cls.PRESETS), 'preset', preset, f'one of {sorted(cls.PRESETS)}')
        return cls(**cls.PRESETS.get(preset or '', {}) | options)

    @classmethod
    def former_preset(cls, saved: Mapping[str, Any]) -> str | None:
        """Return the preset that saved options stand on.

        Args:
            saved: Options beside weights. Until December 2026 only those were saved that a call had
                given: the others are of the presets of that time.
        """
        preset = saved.get('preset')
        options = {name: value for name, value in saved.items() if name in cls.option_names()}
        complete = cls.of_preset(**options).effective_options().keys() <= saved.keys()
        return preset if complete else cls.FORMER_PRESETS.get(preset, preset)

    def require(self, name: str, valid: bool, allowed: str) -> None:
        """As `check`, of the value of a field.

        Args:
            name: Of the field.
            valid: Whether its value is possible.
            allowed: What is possible, in words.
        """
        check(valid, name, getattr(self, name), allowed)

    def unused(self) -> dict[str, str]:
        """Options without effect, and the value of another that leaves them so."""
        found: dict[str, str] = {}
        for each in fields(self):
            for name, idle in each.metadata['idle'].items():
                value, several = getattr(self, name), isinstance(idle, tuple)
                if idle(value) if callable(idle) else value in (idle if several else (idle,)):
                    found.setdefault(each.name, f'{name}={value!r}')
        return found

    def effective_options(self) -> dict[str, Any]:
        """Return all options but those that the others leave without effect."""
        unused = self.unused()
        return {name: value for name, value in asdict(self).items() if name not in unused}

    @property
    def num_routed(self) -> int:
        """Experts that a router chooses from, which come first."""
        return self.num_experts

    @property
    def learns_routing(self) -> bool:
        """Whether what sends tokens to experts is learned; a method that does not is a control."""
        return True

    def of_weights(self) -> set[str]:
        """Options that say, beside tensors, what the answers of a model are."""
        return {each.name for each in fields(self) if each.metadata['of_weights']}


@dataclass(frozen=True, kw_only=True)
class TopKConfig(MoeConfig):
    """Options of methods that send a token to its best experts.

    Args:
        top_k: Experts that are chosen for a token, from 1 to `num_experts`.
    """

    PRESETS: ClassVar[Named] = {'paper': {}, 'matched': {'top_k': 2}}

    top_k: int = option(1)

    def __post_init__(self) -> None:
        super().__post_init__()
        possible, less = 1 <= self.top_k <= self.num_routed, self.num_experts - self.num_routed
        allowed = f'between 1 and num_experts={self.num_experts}'
        self.require('top_k', possible, allowed + (f' minus {less} shared' if less else ''))


@dataclass(frozen=True, kw_only=True)
class BalancedConfig(MoeConfig):
    """Options of methods with a balance loss.

    Args:
        global_balance: The loss is over the tokens of all processes; False: the mean of each one's.
    """

    global_balance: bool = option(True, False, of_weights=False)

    @override
    def unused(self) -> dict[str, str]:
        found = super().unused()
        return found | self._idle_balance(found)

    def _idle_balance(self, found: dict[str, str]) -> dict[str, str]:
        """Return `global_balance` where no loss balances tokens, because of options `found`."""
        weights = [each.name for each in fields(self) if each.metadata['balances']]
        if not all(name in found or getattr(self, name) == 0 for name in weights):
            return {}
        return {'global_balance': ', '.join({found.get(n, f'{n}=0'): None for n in weights})}


def _within(value: Any, bounds: str) -> tuple[bool, str]:
    """Whether a number lies in an interval such as '[0, 1)', and that in words."""
    low, high = bounds[1:-1].split(', ')
    first, above = ('at least', ge) if bounds[0] == '[' else ('above', gt)
    last, below = ('at most', le) if bounds[-1] == ']' else ('below', lt)
    possible = above(value, float(low)) and below(value, float(high))
    return possible, f'{first} {low} and {last} {high}'


def check_renormalize(renormalize: bool, top_k: int) -> None:
    """Refuse the combination in which every weight is 1, so that a router learns nothing."""
    allowed = 'False when top_k=1, else every weight is 1 and the router gets no gradient'
    check(not (renormalize and top_k == 1), 'renormalize', renormalize, allowed)


def check_type(name: str, hint: Any, value: object) -> None:
    """Refuse a value of another type; see `has_type`."""
    check(has_type(value, hint), name, value, f'{inspect.formatannotation(hint)} is expected')


def has_type(value: Any, hint: Any) -> bool:
    """Return True for a value of a type, with that of its parts, and of no other type."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(has_type(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:  # a config may have it as a list
        listed = isinstance(value, list | tuple) and len(value) == len(parts)
        return listed and all(map(has_type, value, parts))
    if origin in (list, dict):
        values = value.values() if isinstance(value, dict) else value
        return isinstance(value, origin) and all(has_type(v, parts[-1]) for v in values)
    if hint is Callable or origin in (type, Callable):
        return callable(value)
    # bool is an int to Python, but no number of experts
    confused = isinstance(value, bool) and hint is not bool
    return isinstance(value, {int: Integral, float: Real}.get(hint, hint)) and not confused
