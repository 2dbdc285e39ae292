"""Vision transformers of the timm family with mixture-of-experts layers."""

from . import create, shipped, vit_moe  # noqa: F401  registers the models with timm
from .complexity import Complexity, complexity
from .convert import convert_to_moe
from .discrete import to_discrete
from .feature_network import fit_reader
from .fitting import load_features
from .moe_vit import MoeVisionTransformer
from .quantization import experts_as_linear, quantize_int8

__all__ = [
    'Complexity',
    'MoeVisionTransformer',
    'complexity',
    'convert_to_moe',
    'experts_as_linear',
    'fit_reader',
    'load_features',
    'quantize_int8',
    'to_discrete',
]
