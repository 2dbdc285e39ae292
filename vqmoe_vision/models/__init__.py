"""Vision transformers of the timm family with mixture-of-experts layers."""

from . import moe_host, shipped, vit_moe  # noqa: F401  registers the models with timm
from .complexity import Complexity, complexity
from .convert import convert_to_moe
from .discrete import to_discrete
from .feature_network import fit_reader
from .quantization import experts_as_linear, quantize_int8
from .sparse_model import MoeVisionTransformer
from .transfer import load_features

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
