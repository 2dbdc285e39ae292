"""The methods by name. docs/how-to/add-a-method-or-option.md says how to add one."""

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from torch import nn

from ..config import MoeConfig
from ..experts import Experts
from ..layer import MoeLayer, RoutedMlp
from ..raw_patches import Host, ImageReader, ReadPatches
from ..routing import Router
from . import ecmoe, hashmoe, smoe, softmoe, stablemoe, vqmoe, xmoe


@dataclass(frozen=True)
class Method:
    """One method."""

    config: type[MoeConfig]  # of its options
    # a router, from the width of tokens, the options, the `Host`, `device` and `dtype`; or what
    # makes a layer, with the experts before the `Host`
    parts: type[Router] | Callable[..., MoeLayer]
    # of a method that decides by the raw image: what its layers find in `host.raw_patches`; a class
    # is called with the options and a dense model
    read_patches: ReadPatches | type[ImageReader] | None = None

    def build(
        self, in_features: int, config: MoeConfig, experts: Experts, host: Host, **factory: Any
    ) -> MoeLayer:
        """A layer for tokens of width `in_features`."""
        make: Any = self.parts
        if isinstance(make, type) and issubclass(make, Router):
            return RoutedMlp(make(in_features, config, host, **factory), experts)
        return make(in_features, config, experts, host, **factory)

    @property
    def needs_features(self) -> bool:
        """Whether it reads images by a frozen network, which somebody has to train before."""
        return isinstance(self.read_patches, type)

    def reader(self, config: MoeConfig, dense: Callable[[], nn.Module], **factory: Any) -> Any:
        """What reads images for the layers of one model; None if nothing does."""
        read: Any = self.read_patches
        return read(config, dense(), **factory) if self.needs_features else read


class _Methods(UserDict[str, Any]):
    """Of one that stands outside of this folder a path, which is imported on first use."""

    def __getitem__(self, name: Any) -> Method:
        found = self.data[name]
        return resolve_name(found) if isinstance(found, str) else found


METHODS = _Methods(
    smoe=Method(smoe.SMoEConfig, smoe.SMoERouter),
    xmoe=Method(xmoe.XMoEConfig, xmoe.XMoERouter),
    stablemoe=Method(stablemoe.StableMoEConfig, stablemoe.build, stablemoe.read_patches),
    softmoe=Method(softmoe.SoftMoEConfig, softmoe.SoftMoEMlp),
    vqmoe=Method(vqmoe.VQMoEConfig, vqmoe.VQMoEMlp),
    ecmoe=Method(ecmoe.ExpertChoiceConfig, ecmoe.ExpertChoiceRouter),
    hashmoe=Method(hashmoe.HashConfig, hashmoe.HashRouter),
    mocle='vqmoe_vision.contrib.mocle:METHOD',
    tgrmoe='vqmoe_vision.contrib.tgrmoe:METHOD',
)
