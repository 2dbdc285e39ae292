"""The two small models that are for trying things, and their weights in the package."""

from importlib.resources import files
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

from vqmoe_vision.contrib.int8 import quantize_int8
from vqmoe_vision.models.create import create_model, method_of
from vqmoe_vision.models.shared_start import share_start

NAMES = ('test_vit_vqmoe', 'test_vit_dense')
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_they_are_small_and_say_what_they_see() -> None:
    for name in NAMES:
        model = timm.create_model(name).eval()
        # two bytes each: what comes with the package has to stay below 2 MB
        assert sum(value.numel() for value in model.state_dict().values()) < 900_000
        assert model(IMAGES).shape == (2, 10)
        assert len(model.pretrained_cfg['label_names']) == 10
        assert timm.data.resolve_model_data_config(model)['input_size'] == (3, 32, 32)


def test_the_sparse_one_begins_with_the_answers_of_the_dense_one(tmp_path) -> None:
    dense = timm.create_model('test_vit_dense').eval()
    torch.save(dense.state_dict(), tmp_path / 'dense.pth')
    options = dict(form='discrete', expert_input='token', input_norm=False)
    path = str(tmp_path / 'dense.pth')
    sparse = timm.create_model('test_vit_vqmoe', upcycle=path, **options).eval()
    torch.testing.assert_close(sparse(IMAGES), dense(IMAGES), rtol=1e-5, atol=1e-5)


def test_both_have_one_start_at_a_seed() -> None:
    models = []
    for name in NAMES:
        models.append(create_model(name))
        share_start(models[-1], name, seed=3)
    sparse, dense = (model.state_dict() for model in models)
    shared = sparse.keys() & dense.keys()
    assert {'head.weight', 'blocks.0.mlp.fc1.weight', 'pos_embed'} <= shared
    assert all(torch.equal(sparse[name], dense[name]) for name in shared)
    assert (method_of('test_vit_vqmoe'), method_of('test_vit_dense')) == ('vqmoe', None)


@pytest.mark.parametrize('name', NAMES)
def test_the_weights_come_with_the_package_and_see_a_cat(name: str) -> None:
    assert f'{name}.cifar10' in timm.list_models(pretrained=True)
    model = timm.create_model(name, pretrained=True).eval()
    file = Path(model.pretrained_cfg['file'])
    assert file.stat().st_size < 2e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    photo = Image.open(files('vqmoe_vision.models') / 'weights/cat.jpg')
    images = create_transform(**resolve_model_data_config(model))(photo)[None]
    assert model.pretrained_cfg['label_names'][model(images).argmax()] == 'cat'


@pytest.mark.parametrize('name', NAMES)
def test_in_int8_they_see_the_same_cat(name: str) -> None:
    pytest.importorskip('torchao')
    model = timm.create_model(name, pretrained=True).eval()
    photo = Image.open(files('vqmoe_vision.models') / 'weights/cat.jpg')
    images = create_transform(**resolve_model_data_config(model))(photo)[None]
    expected = model(images)
    found = quantize_int8(model)(images)
    # bytes lose a 254th of a range, a dozen times one after the other
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()
    # to the dense one it is a dog almost as much, 5.08 and 5.04, and rounding may swap the two
    assert set(found[0].topk(2).indices.tolist()) == set(expected[0].topk(2).indices.tolist())


def test_without_pretrained_nothing_of_them_is_loaded() -> None:
    fresh, trained = (timm.create_model(NAMES[0], pretrained=p) for p in (False, True))
    assert not torch.equal(fresh.head.weight, trained.head.weight)


def test_one_is_upcycled_from_the_other_and_not_from_its_own_weights() -> None:
    dense = timm.create_model('test_vit_dense', pretrained=True).eval()
    options = dict(form='discrete', expert_input='token', input_norm=False)
    sparse = timm.create_model('test_vit_vqmoe', upcycle='test_vit_dense', **options).eval()
    torch.testing.assert_close(sparse(IMAGES), dense(IMAGES), rtol=1e-5, atol=1e-5)


def test_they_are_fine_tuned_to_other_classes_and_travel(tmp_path: Path) -> None:
    model = timm.create_model(NAMES[0], pretrained=True, num_classes=3).eval()
    assert [line for line in model.weights_report.lines() if line.startswith('the head')]
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(IMAGES), model(IMAGES))
