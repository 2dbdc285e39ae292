"""The vision transformers of timm that this package builds on, dense or with experts."""

from __future__ import annotations

from typing import TypeAlias

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

# `Eva` has rotary positions; DINOv3's models are of it.
Transformer: TypeAlias = VisionTransformer | Eva
# Files of timm, and ours, whose models are `VisionTransformer`s, and those with `Eva`s.
OWN_MODULES = ('vit_moe', 'shipped')
VIT_MODULES = ('vision_transformer', 'deit', *OWN_MODULES)
MODULES = (*VIT_MODULES, 'eva')
# Entry point that builds one of timm's and puts experts into it.
MOE_HOST = 'moe_host'
