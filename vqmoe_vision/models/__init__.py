"""Vision transformers of the timm family with mixture-of-experts layers."""

from . import vit_moe  # noqa: F401  registers the models with timm
from .convert import convert_to_moe, to_discrete
from .moe_vit import Complexity, MoeVisionTransformer, complexity

__all__ = ['Complexity', 'MoeVisionTransformer', 'complexity', 'convert_to_moe', 'to_discrete']
