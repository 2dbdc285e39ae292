"""torch.export programs and ONNX files: same answers, any batch, chosen experts alone."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import vision_transformer
from torch import Tensor, nn

from vqmoe_vision.models.export import (
    Exportable,
    differences,
    export_onnx,
    export_program,
    load_exported,
    save_program,
)
from vqmoe_vision.models.shipped import CIFAR10_CLASSES
from vqmoe_vision.moe import METHODS, moe_layers
from vqmoe_vision.moe.routing import TopKRouter

from ..variants import VARIANTS
from .conftest import make
from .elsewhere import IMAGES, run_elsewhere

# Other kernels sum float32 in another order: a few 1e-7 of values near 1.
CLOSE = {'rtol': 1e-5, 'atol': 2e-6}
# Four patches and a class token: few enough tokens that images leave an expert out.
SMALL = {'img_size': 16, 'depth': 1, 'moe_layers': [0], 'embed_dim': 16, 'num_experts': 3}


def needs_onnx() -> None:
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(name)


@torch.no_grad()
def spoil_an_expert(model: nn.Module, images: Tensor) -> Tensor | None:
    """Gives NaN to the expert that most images do without; returns these images, None if none."""
    (layer,) = moe_layers(model).values()
    found = []
    for expert in range(layer.experts.num_experts):
        spoiled = copy.deepcopy(model)
        for parameter in moe_layers(spoiled).popitem()[1].experts.parameters():
            parameter[expert] = torch.nan
        found.append((spoiled, images[spoiled(images).isfinite().all(dim=1)]))
    spoiled, left = max(found, key=lambda pair: len(pair[1]))
    if len(left) < 8:
        return None
    model.load_state_dict(spoiled.state_dict())
    return left[:8]


# the others take the same path, and the long suite has every variant of all
@pytest.mark.parametrize(
    'method', [pytest.param(m, marks=[pytest.mark.long] * (m != 'vqmoe')) for m in METHODS]
)
def test_onnxruntime_gives_the_same_and_computes_no_expert_that_was_not_chosen(
    method: str, tmp_path: Path
) -> None:
    onnx = pytest.importorskip('onnx')
    needs_onnx()
    model = make(method, **SMALL).eval()
    (layer,) = moe_layers(model).values()
    images = spoil_an_expert(model, torch.randn(512, 3, 16, 16))
    if images is None:  # every expert takes part in every image
        assert not isinstance(getattr(layer, 'router', None), TopKRouter)
        images = torch.randn(8, 3, 16, 16)
    file = export_onnx(model, tmp_path / 'model.onnx')
    run = load_exported(file, threads=1)
    with torch.no_grad():
        for batch in (1, 4, 8):
            (found,) = run(images[:batch])
            assert found.isfinite().all()
            torch.testing.assert_close(found, model(images[:batch]), **CLOSE)
    about = {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}
    assert about.items() >= {'channels': 'RGB', 'mean': [0.5] * 3, 'std': [0.5] * 3}.items()


def test_onnxruntime_has_the_threads_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_onnx()
    runtime, given = pytest.importorskip('onnxruntime'), []
    (tmp_path / 'model.onnx').touch()

    def session(_file: Path, options: Any, **_kwargs: Any) -> None:
        given.append(options.intra_op_num_threads)

    monkeypatch.setattr(runtime, 'InferenceSession', session)
    load_exported(tmp_path / 'model.onnx', threads=3)
    load_exported(tmp_path / 'model.onnx')
    assert given == [3, 0]


def test_a_model_of_one_channel_says_nothing_of_three() -> None:
    model = make('smoe', in_chans=1, **SMALL)
    exportable = Exportable.of(model)
    assert exportable.input_size[0] == 1 and exportable.about == {}


@pytest.mark.parametrize('name', ['vit_tiny_smoe', 'vit_tiny_patch16_224', 'test_resnet'])
def test_features_are_no_logits(name: str, tmp_path: Path) -> None:
    options = {} if name == 'test_resnet' else {'depth': 3, 'embed_dim': 12, 'img_size': 32}
    model = timm.create_model(name, features_only=True, **options)
    with pytest.raises(ValueError, match=r'^features_only=True is not possible: False, a timm mo'):
        save_program(model, tmp_path / 'model.pt2')


@pytest.mark.parametrize(('num_classes', 'known'), [(10, True), (7, False), (0, False)])
def test_classes_are_those_of_the_head(num_classes: int, known: bool) -> None:
    model = timm.create_model('test_vit_vqmoe', num_classes=num_classes)
    about = Exportable.of(model).about
    assert about.get('classes') == (list(CIFAR10_CLASSES) if known else None)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for name in ('a.onnx', 'a.pt2'):
        with pytest.raises(ValueError, match=rf"path='.*{name}' is not possible: a file that is"):
            load_exported(tmp_path / name)


@pytest.mark.parametrize('method', METHODS)
def test_a_program_of_every_method_loads_again(method: str, tmp_path: Path) -> None:
    """torch checks a program when it is loaded, and what it wrote itself need not pass."""
    model = make(method, **SMALL).eval()
    run = load_exported(save_program(model, tmp_path / 'model.pt2'), threads=1)
    for difference in differences(model, run, (1, 4)):
        assert difference.largest < 2e-6  # the same operators, in another order


@pytest.mark.long
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_leaves(variant: str, tmp_path: Path) -> None:
    needs_onnx()
    method, options = VARIANTS[variant]
    model = make(method, **{'depth': 2, **options}).eval()
    for file in (
        export_onnx(model, tmp_path / 'model.onnx'),
        save_program(model, tmp_path / 'model.pt2'),
    ):
        for difference in differences(model, load_exported(file, threads=1), (1, 4, 8)):
            assert difference.largest < 2e-6, (file.suffix, difference)


@pytest.mark.long
@pytest.mark.parametrize('opset', [18, 23])
def test_oldest_and_newest_opset(opset: int, tmp_path: Path) -> None:
    onnx = pytest.importorskip('onnx')
    needs_onnx()
    model = make('vqmoe', depth=2)
    file = export_onnx(model, tmp_path / 'model.onnx', opset=opset)
    assert [o.version for o in onnx.load(file).opset_import if o.domain == ''] == [opset]
    assert differences(model, load_exported(file, threads=1))[0].largest < 2e-6


def test_a_program_loads_where_this_package_is_not_imported(tmp_path: Path) -> None:
    model = make('vqmoe', **SMALL)
    file = save_program(model, tmp_path / 'model.pt2')
    answers, about = run_elsewhere(
        file,
        'print(program.module()(images).tolist())',
        'print(extra["about.json"])',
        'assert not any(name.startswith("vqmoe_vision") for name in sys.modules)',
    )
    expected = Exportable.of(model).run(IMAGES)[0]
    torch.testing.assert_close(torch.tensor(json.loads(answers)), expected, **CLOSE)
    assert json.loads(about) == {'channels': 'RGB', 'mean': [0.5] * 3, 'std': [0.5] * 3}


def state_of(model: nn.Module) -> list[tuple]:
    """Modes and switches of all modules, and where all tensors are."""
    switches = [
        (name, module.training, getattr(module, 'grad_checkpointing', None))
        for name, module in model.named_modules()
    ]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [*switches, *((name, tensor.data_ptr()) for name, tensor in tensors)]


def test_a_program_has_torchs_operators_alone_and_leaves_the_model_as_it_was(method: str) -> None:
    model = make(method, **SMALL).train()
    model.set_grad_checkpointing()
    before, values = state_of(model), copy.deepcopy(model.state_dict())
    program = export_program(model)
    targets = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert 'aten.linear.default' in targets
    assert {target for target in targets if 'vqmoe' in target} == set()
    assert state_of(model) == before
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)
    # nor is a tensor of the tracing left in what layers hand to each other
    model.set_grad_checkpointing(False)
    images = torch.randn(7, 3, 16, 16)
    torch.testing.assert_close(program.module()(images), model.eval()(images), **CLOSE)


@pytest.mark.parametrize('name', ['vit_tiny_smoe', 'vit_tiny_patch16_224'])
def test_nothing_is_computed_twice_in_a_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: nn.Module = timm.create_model(name, img_size=16, depth=2, embed_dim=12)
    model.set_grad_checkpointing()
    monkeypatch.setattr(vision_transformer, 'checkpoint_seq', lambda *_: pytest.fail('repeats'))
    program = export_program(model)
    assert program.module()(torch.randn(3, 3, 16, 16)).shape == (3, 1000)


def test_one_batch_size(tmp_path: Path) -> None:
    model = make('smoe', **SMALL)
    run = load_exported(save_program(model, tmp_path / 'model.pt2', batch=3))
    assert differences(model, run, (3,))[0].largest < 2e-6
    with pytest.raises(AssertionError, match='3'):  # of torch
        run(torch.randn(2, 3, 16, 16))


def test_differences_tell_numbers_and_labels() -> None:
    model = Exportable(nn.Identity(), (2, 2, 2), ('pixels',))
    second = torch.tensor([0.0, 8.0])[:, None, None]  # a power of two, which rounds nothing away
    (found,) = differences(model, lambda images: [images + second], (3,))
    equal = int((model.images(3, seed=3).argmax(1) == 1).sum())
    assert 0 < equal < 12 and found.differing == 12
    assert str(found) == f'batch 3, pixels: {equal} of 12 predictions equal, largest difference 8'
    (spoiled,) = differences(model, lambda images: [images * torch.nan], (1,))
    assert str(spoiled).endswith('largest difference nan')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'batch': 0}, 'batch=0 is not possible: at least 1'),
        ({'batch': True}, 'batch=True is not possible: at least 1'),
        ({'opset': 17}, 'opset=17 is not possible: 18 to 23'),
        ({'opset': 99}, 'opset=99 is not possible: 18 to 23'),
        ({'path': 'model.pb'}, r"'model\.pb' is not possible: a name that ends in \.onnx"),
        ({'path': '/proc/none/model.onnx'}, "'/proc/none/model.onnx' cannot be written: No such"),
    ],
    ids=str,
)
def test_what_cannot_be_had(tmp_path: Path, options: dict, message: str) -> None:
    needs_onnx()
    model = nn.Linear(2, 2)
    network = Exportable(model, (1, 2, 2))
    arguments = {'path': tmp_path / 'model.onnx', **options}
    with pytest.raises(ValueError, match=message) as caught:
        export_onnx(network, **arguments)
    assert '\n' not in str(caught.value)


def test_float32_on_the_cpu_alone() -> None:
    with pytest.raises(ValueError, match=r'dtype=torch.bfloat16 .*model.float\(\)'):
        export_program(make('smoe', **SMALL).bfloat16())
    with pytest.raises(ValueError, match=r"device='meta' .*model.cpu\(\)"):
        export_program(make('smoe', **SMALL, device='meta'))


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('vqmoe_vision.models.export._PACKAGES', ('onnx_of_nobody',))
    with pytest.raises(ModuleNotFoundError, match=r'need onnx_of_nobody: pip install .*\[export\]'):
        export_onnx(make('smoe', **SMALL), tmp_path / 'model.onnx')
