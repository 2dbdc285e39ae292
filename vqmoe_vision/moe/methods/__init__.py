"""The methods by name. docs/add-a-method.md says how to add one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import MoeConfig
from ..host import ReadPatches
from ..image_reader import Features, ImageReader
from ..layer import MoeLayer
from . import ecmoe, hashmoe, mocle, smoe, softmoe, stablemoe, vqmoe, xmoe
from ._distilled_router import read_patches


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        config: Class of its options.
        build: Builds its layer from the width of tokens, the options, the experts, the `Host`, and
            `device` and `dtype`.
        read_patches: For a method that decides by the raw image: from images (B, channels, height,
            width) and the grid of patches (rows, columns) to what its layers find in
            `host.raw_patches`, (B, L, F). Or a class of `ImageReader` that does so with a frozen
            network; it is built from the options, the network, and `device` and `dtype`.
    """

    config: type[MoeConfig]
    build: Callable[..., MoeLayer]
    read_patches: ReadPatches | type[ImageReader] | None = None

    @property
    def needs_features(self) -> bool:
        """Whether it reads images by a frozen network, which somebody has to train before."""
        return isinstance(self.read_patches, type)

    def reader(
        self, config: MoeConfig, features: Callable[[], Features], **factory: Any
    ) -> ReadPatches | None:
        """What reads images for the layers of one model; None if nothing does.

        Args:
            config: Options of the method.
            features: Makes the network of an `ImageReader`, if there is to be one.
            **factory: `device` and `dtype`.
        """
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
