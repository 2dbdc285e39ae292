"""The methods by name. docs/add-a-method.md says how to add one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import MoeConfig
from ..image_reader import Features, ImageReader
from ..layer import MoeLayer
from ..raw_patches import ReadPatches
from . import ecmoe, hashmoe, mocle, smoe, softmoe, stablemoe, vqmoe, xmoe
from ._distilled_router import read_patches


@dataclass(frozen=True)
class Method:
    """One method."""

    config: type[MoeConfig]  # of its options
    # from the width of tokens, the options, the experts, the `Host`, `device` and `dtype`
    build: Callable[..., MoeLayer]
    # of a method that decides by the raw image: what its layers find in `host.raw_patches`
    read_patches: ReadPatches | type[ImageReader] | None = None

    @property
    def needs_features(self) -> bool:
        """Whether it reads images by a frozen network, which somebody has to train before."""
        return isinstance(self.read_patches, type)

    def reader(
        self, config: MoeConfig, features: Callable[[], Features], **factory: Any
    ) -> ReadPatches | None:
        """What reads images for the layers of one model; None if nothing does."""
        read: Any = self.read_patches
        return read(config, features(), **factory) if self.needs_features else read


METHODS: dict[str, Method] = {
    'smoe': Method(smoe.SMoEConfig, smoe.build),
    'xmoe': Method(xmoe.XMoEConfig, xmoe.build),
    'stablemoe': Method(stablemoe.StableMoEConfig, stablemoe.build, read_patches),
    'softmoe': Method(softmoe.SoftMoEConfig, softmoe.build),
    'vqmoe': Method(vqmoe.VQMoEConfig, vqmoe.build),
    'ecmoe': Method(ecmoe.ExpertChoiceConfig, ecmoe.build),
    'hashmoe': Method(hashmoe.HashConfig, hashmoe.build),
    'mocle': Method(mocle.MoCLEConfig, mocle.build, mocle.Clusters),
}
