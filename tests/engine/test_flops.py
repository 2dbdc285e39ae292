"""mmengine's count of multiply-accumulates, from a trace, against torch's."""

import pytest
import timm
import torch
from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer

import vqmoe_vision.engine  # noqa: F401  registers the formulas
from vqmoe_vision.models import complexity
from vqmoe_vision.moe import METHODS

# what mmengine counts and torch does not
_NO_PRODUCTS = {'layer_norm', 'adaptive_avg_pool2d'}
# sizes that a trace takes for constants
_TRACED = pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')


@_TRACED
@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', *(f'vit_tiny_{m}' for m in METHODS)])
def test_mmengine_counts_what_torch_counts(name: str) -> None:
    sizes = dict(img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3)
    model = timm.create_model(name, num_classes=5, **sizes).eval()
    images = torch.randn(1, 3, 32, 32)
    counted = FlopAnalyzer(model, images).by_operator()
    products = {name: macs for name, macs in counted.items() if name not in _NO_PRODUCTS}
    assert {'linear', 'scaled_dot_product_attention'} <= products.keys()
    assert sum(products.values()) == complexity(model).macs
    # (R, hidden) and (R, out) of the two layers of the experts, one token in one expert each
    if name.endswith('xmoe'):
        assert ActivationAnalyzer(model, images).by_operator()['grouped_linear'] == 17 * (192 + 48)
