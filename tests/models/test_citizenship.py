"""What timm's users expect of a model: features, sizes, heads, dtypes, copies and scripts."""

import copy
import pickle
from typing import Any

import pytest
import torch
from timm.models._features_fx import create_feature_extractor
from torch import nn

from vqmoe_vision.moe import METHODS

from .. import cases, mostly_long, refused
from .conftest import SHALLOW, make

# Two orders of summation of the same float32 numbers differ by a few 1e-7 per layer.
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}


def test_a_size_that_would_lose_pixels_is_refused_before_anything_changes(tiny):
    model = tiny(dynamic_img_pad=True)  # which the constructor takes with a dynamic size alone
    for sizes in (dict(img_size=(32, 33)), dict(patch_size=5), dict(img_size=33)):
        refused(r'^img_size=.* is not possible: .*patch_size=', model.set_input_size, **sizes)
    assert model.patch_embed.grid_size == (4, 4)


def test_a_dynamic_model_equals_one_set_to_the_size(tiny):
    dynamic = tiny(dynamic_img_size=True).eval()
    fixed = copy.deepcopy(dynamic)
    fixed.set_input_size(img_size=(24, 48))
    images = torch.randn(2, 3, 24, 48)
    torch.testing.assert_close(dynamic(images), fixed(images), **CLOSE)


def test_odd_sizes_are_padded_below_and_right(tiny):
    model = tiny(dynamic_img_size=True, dynamic_img_pad=True).eval()
    images = torch.randn(2, 3, 33, 45)
    padded = nn.functional.pad(images, (0, 48 - 45, 0, 40 - 33))
    torch.testing.assert_close(model(images), model(padded), rtol=0, atol=0)
    maps = model.forward_intermediates(images, indices=1, intermediates_only=True)
    assert maps[0].shape == (2, 32, 5, 6)


def test_features_only_equals_intermediates(tiny):
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    model = tiny().eval()
    torch.manual_seed(0)
    extractor = tiny(features_only=True, out_indices=(0, 2)).eval()
    expected = model.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    torch.testing.assert_close(extractor(images), expected, rtol=0, atol=0)
    assert extractor.feature_info.channels() == [32, 32]
    assert extractor.feature_info.reduction() == [8, 8]


def compiled(model: nn.Module) -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend='eager')


@cases(
    'method, wrap',
    *((method, lambda model: model) for method in METHODS),
    *(pytest.param(*p.values, compiled, marks=p.marks) for p in mostly_long(METHODS, 'vqmoe')),
)
def test_training_uncollected_is_said_once(method, images, monkeypatch, wrap):
    monkeypatch.setattr('vqmoe_vision.moe.layer._said', set())
    model = make(method, depth=2).train()
    needed, model = model.blocks[1].mlp.needs_collecting, wrap(model)
    if not needed:  # and a warning would be an error here
        model(images)
        return
    with pytest.warns(UserWarning, match='collect_losses') as warned:
        model(images)
        model(images)
    # of random features another warning tells
    assert sum('without collect_losses' in str(each.message) for each in warned) == 1


def test_to_empty_and_init_weights_make_a_fresh_model(tiny_variant, images):
    model = tiny_variant(device='meta', **SHALLOW)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {'meta'}
    model.to_empty(device='cpu')
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            # what to_empty leaves behind is arbitrary; make it the worst
            tensor.fill_(torch.nan if tensor.is_floating_point() else 1)
    model.init_weights()
    found = model.state_dict()
    for name, expected in tiny_variant(**SHALLOW).state_dict().items():
        value, expected = found[name].double(), expected.double()
        assert value.isfinite().all(), name
        if expected.std(correction=0) == 0:
            torch.testing.assert_close(value, expected, msg=name)
        elif expected.numel() > 100:
            # the same distribution, so the same spread; 100 draws scatter by 7 %
            torch.testing.assert_close(value.std(), expected.std(), rtol=0.4, atol=0, msg=name)
    assert model.eval()(images).isfinite().all()


def test_every_parameter_gets_a_gradient_in_bfloat16(tiny_variant, train_step, images):
    model = tiny_variant(dtype=torch.bfloat16, **SHALLOW)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.eval()(images.bfloat16()).dtype == torch.bfloat16
    assert train_step(model, None, images.bfloat16(), torch.arange(4)).isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or name.endswith('router.weight') or '.codebook.' in name
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), name


def test_a_copy_computes_the_same_and_shares_nothing(tiny_variant, train_step, images):
    model = tiny_variant(**SHALLOW)
    train_step(model, None, images, torch.arange(4))  # what a step leaves behind
    model.zero_grad()
    expected = model.eval()(images)
    other = torch.randn(2, 3, 32, 32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin_out = twin(other)  # looks at other images than the model does
        torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
        torch.testing.assert_close(twin(images), expected, rtol=0, atol=0)
        torch.testing.assert_close(model(other), twin_out, rtol=0, atol=0)
        own = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
        assert own.isdisjoint(t.data_ptr() for t in [*twin.parameters(), *twin.buffers()])


def test_fx_feature_extraction(tiny, images):
    model = tiny(depth=2).eval()
    extractor = create_feature_extractor(model, {'blocks.1.mlp': 'moe', 'head': 'out'})
    seen = {}
    model.blocks[1].mlp.register_forward_hook(lambda module, args, out: seen.update(moe=out))
    expected = {'out': model(images), **seen}
    torch.testing.assert_close(extractor(images), expected, rtol=0, atol=0)


def test_an_image_does_not_depend_on_its_batch(tiny):
    model = tiny().eval()
    images = torch.randn(64, 3, 32, 32)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images[::8]])
    # A near tie between two experts could fall either way and would show as a large difference;
    # with this seed there is none.
    torch.testing.assert_close(alone, together[::8], **CLOSE)
