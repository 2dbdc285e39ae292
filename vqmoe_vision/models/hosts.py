"""The vision transformers of timm that this package builds on, dense or with experts."""

from typing import TypeAlias

import timm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..moe.methods import METHODS

# `Eva` has rotary positions; DINOv3's models are of it.
Transformer: TypeAlias = VisionTransformer | Eva
# Files of timm, and ours, whose models are `VisionTransformer`s, and those with `Eva`s.
OWN_MODULES = ('vit_moe', 'shipped')
VIT_MODULES = ('vision_transformer', 'deit', *OWN_MODULES)
MODULES = (*VIT_MODULES, 'eva')
# Entry point that builds one of timm's and puts experts into it.
MOE_HOST = 'moe_host'


def method_of(model_name: str) -> str | None:
    """Key of `METHODS` of one of this package's models, None of any other."""
    if not timm.models.is_model_in_modules(model_name, OWN_MODULES):
        return None
    method = model_name.partition('.')[0].rpartition('_')[2]
    return method if method in METHODS else None


def timms_class(module: nn.Module) -> type:
    """The class of timm that a module is, or that one of ours builds on."""
    mro = type(module).__mro__
    return next((kind for kind in mro if kind.__module__.startswith('timm.')), mro[0])
