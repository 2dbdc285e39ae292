"""Vision transformers of the timm family with mixture-of-experts layers."""

from .complexity import Complexity, complexity
from .vit_moe import MoeVisionTransformer

__all__ = ['Complexity', 'MoeVisionTransformer', 'complexity']
