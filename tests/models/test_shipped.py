"""The two small models that are for trying things, and their weights in the package."""

from importlib.resources import files
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

NAMES = ('test_vit_vqmoe', 'test_vit_dense')
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


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


def test_one_is_upcycled_from_the_other_and_not_from_its_own_weights() -> None:
    dense = timm.create_model('test_vit_dense', pretrained=True).eval()
    options = dict(form='discrete', expert_input='token', input_norm=False)
    sparse = timm.create_model('test_vit_vqmoe', upcycle='test_vit_dense', **options).eval()
    torch.testing.assert_close(sparse(IMAGES), dense(IMAGES), rtol=1e-5, atol=1e-5)
