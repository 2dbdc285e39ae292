"""Experts as nn.Linear modules, and int8 of them and all else, in PyTorch and in onnxruntime."""

import copy
import io
import json

import pytest
import torch
from torch import nn

from vqmoe_vision.contrib.int8 import experts_as_linear, export_int8, quantize_int8
from vqmoe_vision.models.export import Exportable, differences, load_exported
from vqmoe_vision.moe import METHODS, collect_losses, moe_layers
from vqmoe_vision.moe.experts import StackedLinear

from .. import cases, needs_onnx, refused
from ..models.conftest import make
from ..models.test_export import CLOSE, IMAGES, run_elsewhere

# Five tokens of an image leave at least three experts without one, unless a method mixes them.
SMALL = {'img_size': 16, 'depth': 1, 'moe_layers': [0], 'embed_dim': 16, 'num_experts': 8}


def started(method: str, **options: object) -> nn.Module:
    """In eval mode, with codebooks that have seen tokens, and experts that differ by much."""
    model = make(method, **{'depth': 2, **options})
    with torch.no_grad():
        with collect_losses(model):
            model.train()(torch.randn(8, 3, *[options.get('img_size', 32)] * 2))
        for layer in moe_layers(model).values():
            for parameter in layer.experts.parameters():
                parameter.mul_(5)
    return model.eval()


def is_int8(module: nn.Module) -> bool:
    return type(getattr(module, 'weight', None)).__name__ == 'Int8Tensor'


def test_answers_are_the_same(method):
    model, images = started(method), torch.randn(3, 3, 32, 32)
    separate = experts_as_linear(copy.deepcopy(model))
    assert not any(isinstance(module, StackedLinear) for module in separate.modules())
    with torch.no_grad():
        torch.testing.assert_close(separate(images), model(images), **CLOSE)
    again = experts_as_linear(copy.deepcopy(separate))
    assert list(again.state_dict()) == list(separate.state_dict())


def test_int8_of_every_method_is_near_and_as_small_as_it_should_be(method):
    pytest.importorskip('torchao')
    model, images = started(method), torch.randn(32, 3, 32, 32)
    separate = experts_as_linear(copy.deepcopy(model))
    quantized = quantize_int8(copy.deepcopy(model))
    with torch.no_grad():
        expected, found = model(images), quantized(images)
    # A step of int8 is 1/254 of a row's range, so that several layers are a few hundredths off; the
    # median leaves out images of which a token goes to another expert.
    off = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert 1e-4 < off.median() < 0.06
    sizes = []
    for each in (separate, quantized):
        torch.save(each.state_dict(), file := io.BytesIO())
        sizes.append(file.tell())
    (layer,) = moe_layers(quantized).values()
    inside = [name for name, module in layer.named_modules() if is_int8(module)]
    assert len(inside) == 2 * layer.experts.num_experts
    assert all(name.startswith('experts.') for name in inside)
    layers = [module for module in quantized.modules() if is_int8(module)]
    # of four bytes per weight one is left, and an output has a scale (4) and a zero point (1)
    saved = sum(3 * m.weight.numel() - 5 * m.out_features for m in layers)
    assert len(layers) == 2 * 2 + 2 + 2 * 8 + 1  # attention, MLP, experts, head
    assert saved == pytest.approx(sizes[0] - sizes[1], abs=1500 * len(layers))
    assert saved > 0.5 * sizes[0] or METHODS[method].needs_features


@pytest.mark.long
def test_onnx_files_in_int8(method, tmp_path):
    """Int8 in as many layers, near to the model, which stays as it was."""
    needs_onnx()
    import onnx

    exportable = Exportable.of(started(method, **SMALL))
    before = copy.deepcopy(exportable.network.state_dict())
    file = export_int8(exportable, tmp_path / 'model.onnx')
    torch.testing.assert_close(exportable.network.state_dict(), before, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ['model.onnx']
    graph = onnx.load(file)
    integers = [node for node in graph.graph.node if node.op_type == 'MatMulInteger']
    assert len(integers) == 2 + 2 * SMALL['num_experts'] + 1
    assert {entry.key for entry in graph.metadata_props} == {'onnx.infer', *exportable.about}
    for difference in differences(exportable, load_exported(file, threads=1), (1, 8)):
        # a step of seven bits is 1/126 of a range; a token that goes elsewhere changes more
        assert 1e-6 < difference.largest < 0.2


@pytest.mark.long
def test_a_program_in_int8_loads_where_neither_torchao_nor_this_package_is(tmp_path):
    pytest.importorskip('torchao')
    model = started('vqmoe', **SMALL)
    file = export_int8(model, tmp_path / 'model.pt2')
    answers, dtypes = run_elsewhere(
        file,
        'print([program.module()(images[:n]).tolist() for n in (1, 3)])',
        'assert "torchao" not in sys.modules',
        'print(sorted({str(weight.dtype) for weight in program.state_dict.values()}))',
    )
    assert 'torch.int8' in dtypes
    quantized = quantize_int8(model)
    with torch.no_grad():
        for number, found in zip((1, 3), json.loads(answers), strict=True):
            # roundings to int8 flip where float32 is summed in another order
            expected = quantized(IMAGES[:number])
            torch.testing.assert_close(torch.tensor(found), expected, rtol=0.02, atol=1e-3)


@cases(
    'spoil, message',
    (lambda m: m.train(), r'model.training=True .*call model.eval\(\)'),
    (lambda m: m.double(), r'dtype=torch.float64 .*float32 or bfloat16: .*model.float\(\)'),
    (lambda m: m.to('meta'), r"device='meta' .*cpu or cuda: .*model.cpu\(\)"),
    (quantize_int8, "model='MoeVisionTransformer' .*one with linear layers in float"),
    ids=['training', 'float64', 'meta', 'int8'],
)
def test_what_has_no_kernel_is_one_line_and_changes_nothing(spoil, message):
    pytest.importorskip('torchao')
    model = spoil(make('vqmoe', depth=2).eval())
    before = list(model.state_dict())
    refused(message, quantize_int8, model)
    assert list(model.state_dict()) == before
