"""The methods by name. docs/add-a-method.md says how to add one."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from torch import nn

from ..config import MoeConfig
from ..host import ImageReader, ReadPatches
from ..layer import MoeLayer
from . import ecmoe, hashmoe, smoe, softmoe, stablemoe, vqmoe, xmoe
from ._distilled_router import read_patches


@dataclass(frozen=True)
class Method:
    """One method."""

    config: type[MoeConfig]  # of its options
    # from the width of tokens, the options, the experts, the `Host`, `device` and `dtype`
    build: Callable[..., MoeLayer]
    # of a method that decides by the raw image: what its layers find in `host.raw_patches`; a class
    # is called with the options and a dense model
    read_patches: ReadPatches | type[ImageReader] | None = None

    @property
    def needs_features(self) -> bool:
        """Whether it reads images by a frozen network, which somebody has to train before."""
        return isinstance(self.read_patches, type)

    def reader(
        self, config: MoeConfig, dense: Callable[[], nn.Module], **factory: Any
    ) -> ReadPatches | None:
        """What reads images for the layers of one model; None if nothing does."""
        read: Any = self.read_patches
        return read(config, dense(), **factory) if self.needs_features else read


class _Methods(UserDict[str, Any]):
    """Of one that stands outside of this folder a path, which is imported on first use."""

    def __getitem__(self, name: Any) -> Method:
        found = self.data[name]
        if isinstance(found, str):
            found = self.data[name] = resolve_name(found)
        return found


METHODS = _Methods(
    {
        'smoe': Method(smoe.SMoEConfig, smoe.build),
        'xmoe': Method(xmoe.XMoEConfig, xmoe.build),
        'stablemoe': Method(stablemoe.StableMoEConfig, stablemoe.build, read_patches),
        'softmoe': Method(softmoe.SoftMoEConfig, softmoe.build),
        'vqmoe': Method(vqmoe.VQMoEConfig, vqmoe.build),
        'ecmoe': Method(ecmoe.ExpertChoiceConfig, ecmoe.build),
        'hashmoe': Method(hashmoe.HashConfig, hashmoe.build),
        'mocle': 'vqmoe_vision.contrib.mocle:METHOD',
    }
)
