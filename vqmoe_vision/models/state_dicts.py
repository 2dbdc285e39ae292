"""State dicts side by side: what does not fit, and what became of each tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..moe import moe_layers
from ..moe.raw_patches import ImageReader

StateDict = dict[str, Tensor]
CLASSIFIERS = ('head.', 'head_dist.')
HEADS = (*CLASSIFIERS, 'attn_pool.')
# Where timm has the last norm.
NORMS = ('norm.', 'fc_norm.')
Value = TypeVar('Value')


@dataclass(frozen=True)
class Report:
    """What became of each tensor of a model, and of each of a checkpoint."""

    # of the model
    loaded: tuple[str, ...] = ()
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)  # and of which tensor of the checkpoint
    initialised: tuple[str, ...] = ()
    # of the checkpoint: without a place in the model, and outside of the model's part
    unused: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # those of the remarks that nobody may have meant

    @classmethod
    def of_warnings(cls, lines: tuple[str, ...]) -> Report:
        """A report of nothing but remarks that nobody may have meant."""
        return cls(remarks=lines, warnings=lines)

    @classmethod
    def of_result(
        cls,
        result: StateDict,
        expected: Iterable[str],
        resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
        copied: dict[str, str],
        **others: tuple[str, ...],
    ) -> Report:
        """That of a state dict which a model loads."""
        return cls(
            loaded=tuple(k for k in result if k not in resized and k not in copied),
            resized=resized,
            copied=copied,
            initialised=tuple(k for k in expected if k not in result),
            **others,
        )

    def joined(self, other: Report) -> Report:
        """Both reports as one, of two parts of a model."""
        parts: dict[str, Any] = {}
        for name, value in vars(self).items():
            more = vars(other)[name]
            parts[name] = value | more if isinstance(value, dict) else (*value, *more)
        return Report(**parts)

    def lines(self) -> list[str]:
        """For a log; a head that starts anew has its line among the remarks."""
        notes = list(self.remarks)
        notes += [
            f'{name} resized from {before} to {after}'
            if before != after
            else f'{name} resized from another grid of as many positions, {before}'
            for name, (before, after) in self.resized.items()
        ]
        initialised = [name for name in self.initialised if not name.startswith(CLASSIFIERS)]
        found = [*self.loaded, *self.resized]
        number = len(found) + len(self.copied) + len(initialised)
        whole = 'model' if any(name.startswith(CLASSIFIERS) for name in found) else 'backbone'
        notes.append(f'loaded {len(found)} of the {number} tensors of the {whole}')
        if self.copied:
            experts = [name for name in self.copied if '.experts.' in name]
            notes.append(f'made of dense MLPs: {", ".join(experts)}')
        if initialised:
            notes.append(f'not in the checkpoint, as initialised: {", ".join(initialised)}')
        if self.unused:
            notes.append(f'not in the model, unused: {", ".join(self.unused)}')
        return notes

    def listed(self) -> list[str]:
        """Every tensor, with what became of it."""
        return [
            *(f'{name}: loaded' for name in self.loaded),
            *(f'{name}: resized from {old} to {new}' for name, (old, new) in self.resized.items()),
            *(f'{name}: made of {source}' for name, source in self.copied.items()),
            *(f'{name}: as initialised' for name in self.initialised),
            *(f'{name} of the source: unused' for name in (*self.unused, *self.outside)),
        ]


def part_of(state: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    """What has names under a prefix, by the rest of its names."""
    return {k[len(prefix) :]: value for k, value in state.items() if k.startswith(prefix)}


class TakesOtherNames:
    """Mixin of a model that loads checkpoints of other code, and translates them itself."""

    def in_own_names(self, state: StateDict) -> StateDict:
        """What it would load in the place of a checkpoint."""
        raise NotImplementedError


def misfit_of(model: nn.Module, state_dict: StateDict) -> str:
    """As `misfit`, of a model that is about to load a state dict."""
    state = {name.removeprefix('module.'): value for name, value in state_dict.items()}
    if isinstance(model, TakesOtherNames):
        state = model.in_own_names(state)
    for layer_name, layer in moe_layers(model).items():
        prefix = f'{layer_name}.'
        for name in layer.omitted(list(part_of(state, prefix))):
            del state[prefix + name]
    expected = model.state_dict()
    for reader_name, reader in model.named_modules():
        if isinstance(reader, ImageReader):
            prefix = f'{reader_name}.'
            own = reader.expected(part_of(state, prefix))
            expected = {k: v for k, v in expected.items() if not k.startswith(prefix)}
            expected |= {prefix + name: value for name, value in own.items()}
    return misfit(expected, state)


def misfit(expected: StateDict, state_dict: StateDict) -> str:
    """What keeps a state dict from being loaded, in words; empty if nothing does."""
    state = {name.removeprefix('module.'): value for name, value in state_dict.items()}
    parts = {
        'missing keys': [name for name in expected if name not in state],
        'unexpected keys': [name for name in state if name not in expected],
        'shapes': other_shapes(expected, state),
    }
    return '; '.join(f'{what}: {shorten(names)}' for what, names in parts.items() if names)


def as_tensors(state: Mapping[str, Any], expected: StateDict, path: str) -> StateDict:
    """Weights with which can be computed: those of eight bits as float32, which has all of them."""
    refuse_without_values(state, path)
    for name, value in state.items():
        if name in expected and not isinstance(value, Tensor):
            kind = f'{type(value).__module__}.{type(value).__qualname__}'
            raise ValueError(
                f'checkpoint {path!r} does not fit the model: {name} is a {kind}, and weights are '
                'tensors; torch.from_numpy makes one of an array'
            )
    return {name: value.float() if _is_small(value) else value for name, value in state.items()}


def refuse_without_values(state: Mapping[str, Any], path: str) -> None:
    """Refuse tensors that are sparse, or of the meta device, which no parameter can take."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if value.layout is not torch.strided:
            raise ValueError(
                f'checkpoint {path!r} has sparse weights, which are not loaded: {name} is of '
                f'{value.layout}; to_dense() makes a tensor of it, and torch.save writes the file '
                'again'
            )
        if value.is_meta:
            raise ValueError(
                f'checkpoint {path!r} has tensors without values: {name} was saved on the meta '
                'device; the model has to be on another one when it is saved'
            )


def _is_small(value: Any) -> bool:
    tensor = isinstance(value, Tensor)
    return tensor and value.is_floating_point() and value.element_size() == 1


def other_shapes(expected: StateDict, state: StateDict) -> list[str]:
    """Tensors of the same name that differ in shape, and the shapes of both, in words."""
    return [
        f'{name} is {tuple(state[name].shape)}, the model has {tuple(value.shape)}'
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]


def layer_of(name: str) -> str:
    """'blocks.1.mlp' of 'blocks.1.mlp.router.weight', and nothing of what is not in an MLP."""
    layer, found, _ = name.partition('.mlp.')
    return f'{layer}.mlp' if found else ''


def block_of(name: str) -> str:
    """'blocks.1.' of 'blocks.1.mlp.fc1.weight', and nothing of what is in no block."""
    match = re.match(r'blocks\.\d+\.', name)
    return match[0] if match else ''


def is_square(count: int) -> bool:
    """Whether so many positions may be those of a square image."""
    return count > 0 and math.isqrt(count) ** 2 == count


def shorten(names: Iterable[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more
