"""Warnings that a process gives once."""

import warnings

import torch

_said: set[str] = set()


@torch.compiler.assume_constant_result  # a compiled model says it as it is compiled
def warn_once(text: str) -> None:
    """Warn, unless this text has been said."""
    if text not in _said:
        _said.add(text)
        warnings.warn(text, stacklevel=2)
