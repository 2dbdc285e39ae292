"""mmengine's `compile`, which takes a whole training step."""

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch._dynamo.testing import CompileCounterWithBackend

from vqmoe_vision.classification.classifier import Classifier
from vqmoe_vision.moe import METHODS, update_state

TINY = {'img_size': 16, 'patch_size': 8, 'depth': 2, 'embed_dim': 16, 'num_heads': 2}


@pytest.mark.long
@pytest.mark.filterwarnings('ignore')  # of dynamo, about what it leaves out of a step
@pytest.mark.parametrize('method', METHODS)
def test_a_step_is_not_compiled_anew_when_state_has_changed(method: str) -> None:
    torch._dynamo.reset()
    model = Classifier(model_name=f'vit_tiny_{method}', num_classes=4, **TINY).train()
    model.state_is_moved = True  # by the hook that `update_state` stands for
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    counter = CompileCounterWithBackend('eager')
    step = torch.compile(model.train_step, backend=counter)
    graphs = []
    for _ in range(7):
        step((torch.randn(4, 3, 16, 16), torch.arange(4)), wrapper)
        update_state(model.routed_model)
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    # the first steps set up codebooks and statistics
    assert graphs[3:] == graphs[3:4] * 4
