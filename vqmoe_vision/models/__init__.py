"""Vision transformers of the timm family with mixture-of-experts layers."""

from . import shipped, vit_moe  # noqa: F401  registers the models with timm
from .complexity import Complexity, complexity
from .convert import convert_to_moe, to_discrete
from .moe_vit import MoeVisionTransformer

__all__ = [
    'Complexity',
    'MoeVisionTransformer',
    'complexity',
    'convert_to_moe',
    'to_discrete',
]
