"""The two small models that are for trying things."""

import timm
import torch

from vqmoe_vision.models.create import create_model, method_of
from vqmoe_vision.models.shared_start import share_start

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_they_are_small_and_say_what_they_see() -> None:
    for name in ('test_vit_vqmoe', 'test_vit_dense'):
        model = timm.create_model(name).eval()
        # four bytes each: what comes with the package has to stay below 4 MB
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
    for name in ('test_vit_vqmoe', 'test_vit_dense'):
        models.append(create_model(name))
        share_start(models[-1], name, seed=3)
    sparse, dense = (model.state_dict() for model in models)
    shared = sparse.keys() & dense.keys()
    assert {'head.weight', 'blocks.0.mlp.fc1.weight', 'pos_embed'} <= shared
    assert all(torch.equal(sparse[name], dense[name]) for name in shared)
    assert (method_of('test_vit_vqmoe'), method_of('test_vit_dense')) == ('vqmoe', None)
