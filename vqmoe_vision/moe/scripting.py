"""Modules that stay Python inside a model that torch.jit.script compiles, and cannot save."""

# no `from __future__ import annotations`: TorchScript reads the annotations of `forward` as types

from typing import ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

_scripted: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


class StaysPython(nn.Module):
    """Base of modules with code that TorchScript cannot compile; subclasses implement `run`."""

    __jit_unused_properties__: ClassVar[list[str]] = ['__jit_ignored_attributes__']

    @property
    def __jit_ignored_attributes__(self) -> list[str]:
        # keeping the bound `run` keeps this module alive; nothing but the handle is compiled
        compiled = ('training', 'script_handle')
        own = [name for name in vars(self) if name[0] != '_' and name not in compiled]
        return ['run', *self._modules, *own]

    def __prepare_scriptable__(self) -> 'StaysPython':
        self.script_handle = id(self)
        _scripted[self.script_handle] = self
        return self

    @torch.jit.ignore
    def forward(self, x: Tensor) -> Tensor:
        """As `run`."""
        # inside a compiled model, `self` is a shell that knows nothing but the handle
        module = self if isinstance(self, StaysPython) else _scripted[self.script_handle]
        return module.answer(x)

    def answer(self, x: Tensor) -> Tensor:
        """What `forward` gives: `run`, and in a subclass what has to be seen to around it."""
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """What the module computes."""
        raise NotImplementedError
