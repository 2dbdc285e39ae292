"""The methods by name: how each is configured and built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..collect import MoeLayer
from ..config import MoeConfig
from . import smoe, softmoe, stablemoe, vqmoe, xmoe


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        config: Class of its options.
        build: Builds its layer from `in_features`, the options and the experts.
        context: Names of further arguments that `build` needs from the model.
    """

    config: type[MoeConfig]
    build: Callable[..., MoeLayer]
    context: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    'smoe': Method(smoe.SMoEConfig, smoe.build),
    'xmoe': Method(xmoe.XMoEConfig, xmoe.build),
    'stablemoe': Method(
        stablemoe.StableMoEConfig, stablemoe.build, ('source', 'in_chans', 'num_prefix_tokens')
    ),
    'softmoe': Method(softmoe.SoftMoEConfig, softmoe.build, ('num_tokens', 'num_prefix_tokens')),
    'vqmoe': Method(vqmoe.VQMoEConfig, vqmoe.build),
}
