"""The methods by name. docs/add-a-method.md says how to add one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..config import MoeConfig
from ..host import ReadPatches
from ..layer import MoeLayer
from . import ecmoe, hashmoe, smoe, softmoe, stablemoe, vqmoe, xmoe
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
            `host.raw_patches`, (B, L, F).
    """

    config: type[MoeConfig]
    build: Callable[..., MoeLayer]
    read_patches: ReadPatches | None = None


METHODS: dict[str, Method] = {
    'smoe': Method(smoe.SMoEConfig, smoe.build),
    'xmoe': Method(xmoe.XMoEConfig, xmoe.build),
    'stablemoe': Method(stablemoe.StableMoEConfig, stablemoe.build, read_patches),
    'softmoe': Method(softmoe.SoftMoEConfig, softmoe.build),
    'vqmoe': Method(vqmoe.VQMoEConfig, vqmoe.build),
    'ecmoe': Method(ecmoe.ExpertChoiceConfig, ecmoe.build),
    'hashmoe': Method(hashmoe.HashConfig, hashmoe.build),
}
