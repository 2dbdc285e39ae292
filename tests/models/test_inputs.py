"""Batches that are empty, and batches of which one image is broken."""

from copy import deepcopy

import pytest
import torch

from vqmoe_vision import collect_losses
from vqmoe_vision.moe import METHODS

from ..variants import VARIANTS
from .conftest import make

both_modes = pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])


@both_modes
def test_an_empty_batch_has_an_empty_answer_and_teaches_nothing(tiny_variant, training):
    model = tiny_variant(depth=2).train(training)
    before = deepcopy(model.state_dict())
    with collect_losses(model) as collected:
        output = model(torch.empty(0, 3, 32, 32))
        total = output.sum() + collected.total()
        total.backward()
    assert output.shape == (0, 10)
    assert total.isfinite()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and training:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name  # NaN is no zero either
    for name, tensor in model.state_dict().items():
        if not name.endswith('.steps'):  # an update without images is an update
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, msg=name)


@both_modes
@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.usefixtures('two_threads')
def test_a_broken_pixel_breaks_no_other_image(name, training, images):
    method, options = VARIANTS[name]
    limit = 'capacity_factor' if training else 'eval_capacity_factor'
    if 'eval_capacity_factor' in METHODS[method].config.option_names() and options.get(limit):
        pytest.skip('the images of a batch share the places of an expert')
    model = make(method, depth=2, **options).train(training)
    broken = images.clone()
    broken[1, 0, 9, 9] = torch.nan
    outputs = []
    for batch in (images, broken):
        copy = deepcopy(model)
        torch.manual_seed(0)  # router noise
        with torch.no_grad(), collect_losses(copy):
            outputs.append(copy(batch))
        for buffer, tensor in copy.named_buffers():
            assert not tensor.is_floating_point() or tensor.isfinite().all(), buffer
    others = [0, 2, 3]
    assert outputs[1][1].isnan().all()
    torch.testing.assert_close(outputs[1][others], outputs[0][others])
