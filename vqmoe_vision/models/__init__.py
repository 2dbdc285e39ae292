"""Vision transformers of the timm family with mixture-of-experts layers."""

from .complexity import Complexity, complexity
from .convert import convert_to_moe, to_discrete
from .vit_moe import MoeVisionTransformer

__all__ = ['Complexity', 'MoeVisionTransformer', 'complexity', 'convert_to_moe', 'to_discrete']
