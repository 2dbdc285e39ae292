"""Vision transformers of the timm family with mixture-of-experts layers."""

from . import moe_host, shipped, vit_moe  # noqa: F401  registers the models with timm
from .complexity import Complexity, complexity
from .convert import convert_to_moe, to_discrete
from .feature_network import fit_reader
from .sparse_model import MoeVisionTransformer
from .transfer import load_features

__all__ = [
    'Complexity',
    'MoeVisionTransformer',
    'complexity',
    'convert_to_moe',
    'fit_reader',
    'load_features',
    'to_discrete',
]
