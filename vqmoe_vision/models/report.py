"""What became of each tensor, in one value: the only place that words it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .compat import CLASSIFIERS, StateDict
from .normalization import Normalization

Size = tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What became of each tensor of a model, and of each of a checkpoint."""

    # of the model
    loaded: tuple[str, ...] = ()
    resized: dict[str, tuple[Size, Size]] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)  # and of which tensor of the checkpoint
    initialised: tuple[str, ...] = ()
    # of the checkpoint: without a place in the model, and outside of the model's part
    unused: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # those of the remarks that nobody may have meant
    normalization: Normalization | None = None  # of images, if the checkpoint is of a run

    @classmethod
    def of(
        cls,
        result: StateDict,
        expected: Iterable[str],
        resized: dict[str, tuple[Size, Size]],
        copied: dict[str, str],
        **others: Any,
    ) -> 'Report':
        """That of a state dict which a model loads."""
        loaded = tuple(k for k in result if k not in resized and k not in copied)
        return cls(loaded, resized, copied, tuple(k for k in expected if k not in result), **others)

    def joined(self, other: 'Report') -> 'Report':
        """Both reports as one, of two parts of a model."""
        pairs = ((name, value, vars(other)[name]) for name, value in vars(self).items())
        tensors = ((name, a, b) for name, a, b in pairs if name != 'normalization')
        return Report(**{k: a | b if isinstance(a, dict) else a + b for k, a, b in tensors})

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
