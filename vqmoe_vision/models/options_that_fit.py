"""Options with which MoE layers would have the tensors of a checkpoint, found by trial.

Layers are built without memory, with one option of the method after another at another value, and
their names and shapes are compared. So nothing here knows what the tensors of a method are called,
and a method of tomorrow is told its options as those of today are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from torch import Tensor, nn

from ..moe import moe_layers
from ..moe.config import MoeConfig, types_of
from ..moe.methods import METHODS
from ..moe.raw_patches import Host, RawPatches
from .layers import build_layer, host_of, mlp_ratio_of
from .state_dicts import StateDict, part_of
from .structure import structure_only
from .would_fit import in_words

Shapes = dict[str, tuple[int, ...]]
Options = dict[str, Any]
# As `experts_as_linear` leaves them.
_LINEAR = re.compile(r'(experts\.fc[12])\.\d+\.(weight|bias)')


@dataclass(frozen=True)
class Fitting:
    """Experts that a checkpoint would fit, in words."""

    options: str = ''
    methods: str = ''
    fits: bool = False

    def __str__(self) -> str:
        """All of them, for the end of a line; empty if there are none."""
        found = ', or '.join(part for part in (self.options, self.methods) if part)
        return f'; {found} would fit' if found else ''


def experts_that_fit(
    model: nn.Module, state: StateDict, width: int | None = None, mlp_ratio: float | None = None
) -> Fitting:
    """Which experts a model would have to have for those of a checkpoint."""
    sparse: Any = next((m for m in model.modules() if hasattr(m, 'moe_config')), None)
    layers = moe_layers(model)
    theirs = _shapes_of_all([part_of(state, f'{name}.') for name in layers])
    ours = _shapes_of_all([layer.state_dict() for layer in layers.values()])
    first = 'experts.fc1.weight'
    given = theirs.get(first, ())[2:]
    if sparse is None or ours == theirs or given != ((width,) if width else ours[first][2:]):
        return Fitting()
    search = _Search.of(sparse, ours, theirs)
    if search.distance(sparse.method, sparse.moe_config, ours) > 0:
        return Fitting()  # something was made of the layers since they were built
    search = replace(search, width=width or search.width, mlp_ratio=mlp_ratio or search.mlp_ratio)
    own = search.options(sparse.method, sparse.moe_config)
    shared = {field.name: getattr(sparse.moe_config, field.name) for field in fields(MoeConfig)}
    others = {
        name: search.options(name, method.config(**shared))
        for name, method in METHODS.items()
        if name != sparse.method
    }
    return Fitting(' or '.join(map(in_words, own)), _models(others), fits=bool(own))


@dataclass(frozen=True)
class _Search:
    """Looks for options of a layer whose tensors have the shapes of a checkpoint."""

    host: Host
    width: int
    mlp_ratio: float
    bias: bool
    theirs: Shapes

    @classmethod
    def of(cls, model: Any, ours: Shapes, theirs: Shapes) -> _Search:
        """Of a model."""
        _, hidden, width = ours['experts.fc1.weight']
        ratio = mlp_ratio_of(hidden, width)
        return cls(host_of(model, RawPatches()), width, ratio, 'experts.fc1.bias' in ours, theirs)

    def options(self, method: str, config: MoeConfig) -> list[Options]:
        """Changes of options, of which each alone makes a layer that fits; empty if nothing does."""  # LONG
        known: dict[str, int] = {}  # half of all changes lead where others have led

        def distance(changes: Options) -> float:
            try:
                changed = replace(config, **changes)
            except ValueError:  # impossible together
                return math.inf
            # an option of a user's method may have no hash
            if (written := repr(changed)) not in known:
                known[written] = self.distance(method, changed, self.theirs)
            return known[written]

        found: Options = {}
        while (left := distance(found)) > 0:
            found = min((found | step for step in self._steps(config)), key=distance)
            if distance(found) >= left:
                return []
        for name in list(found):
            without = {k: v for k, v in found.items() if k != name}
            found = without if distance(without) == 0 else found
        others = (
            {**found, name: value}
            for name in found
            for value in self._values(type(config), name)
            if value != found[name]
        )
        return [found, *(changes for changes in others if distance(changes) == 0)]

    def distance(self, method: str, config: MoeConfig, shapes: Shapes) -> int:
        """How many tensors differ, in name or shape, between a layer with some options and others."""  # LONG
        with structure_only():
            layer = build_layer(
                method,
                config,
                self.host,
                self.width,
                self.mlp_ratio,
                bias=self.bias,
                patch_drop_rate=0.0,
            )
        built = _shapes(layer.state_dict())
        return sum(built.get(name) != shapes.get(name) for name in built | shapes)

    def _steps(self, config: MoeConfig) -> Iterator[Options]:
        """Single options, and those that a method names together, which may not go alone."""
        kind = type(config)
        for field in fields(config):
            yield from ({field.name: value} for value in self._values(kind, field.name))
        yield from _named(kind)

    def _values(self, kind: type[MoeConfig], name: str) -> list[Any]:
        """Values of an option: its default, those in tables of the method, and sizes of tensors."""
        default = kind.__dataclass_fields__[name].default
        values = [default, *(options[name] for options in _named(kind) if name in options)]
        hint = types_of(kind)[name]
        kinds = get_args(hint) or (hint,)
        if name == 'expert_mlp_ratio':
            values.append(mlp_ratio_of(*self.theirs['experts.fc1.weight'][1:]))
        elif int in kinds:
            values += sorted({size for shape in self.theirs.values() for size in shape})
        elif bool in kinds:
            values += [False, True]
        return list(dict.fromkeys(values))


def _named(kind: type[MoeConfig]) -> list[Options]:
    """What a method gives names to: its presets, and what its tests try."""
    named = [*kind.PRESETS.values(), *kind.EXACT_UPCYCLING.values()]
    tried = [(each.name, value) for each in fields(kind) for value in each.metadata['trials']]
    return named + [v if isinstance(v, dict) else {name: v} for name, v in tried]


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    """Shapes by name, those of experts that are linear layers as if they were stacked."""
    shapes: Shapes = {}
    for name, value in state.items():
        linear = _LINEAR.fullmatch(name)
        stacked = f'{linear[1]}.{linear[2]}' if linear else name
        number = (shapes.get(stacked, (0,))[0] + 1,) if linear else ()
        shapes[stacked] = (*number, *value.shape)
    return shapes


def _shapes_of_all(layers: Sequence[Mapping[str, Tensor]]) -> Shapes:
    """Those of each of some layers; empty if they are not the same."""
    first, *others = map(_shapes, layers) if layers else ({},)
    return first if all(shapes == first for shapes in others) else {}


def _models(others: Mapping[str, Sequence[Options]]) -> str:
    """Models of other methods; those come first that need no other options."""
    known = {name: ' or '.join(map(in_words, found)) for name, found in others.items() if found}
    names = [
        f'of {name} with {options}' if options else f'of {name}'
        for name, options in sorted(known.items(), key=lambda item: bool(item[1]))
    ]
    return f'a model {", or ".join(names)}' if names else ''
