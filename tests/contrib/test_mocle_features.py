"""The dense network by whose features images are clustered: its answers, weights and cost."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from vqmoe_vision.contrib.mocle import fit_reader, load_features
from vqmoe_vision.models import convert_to_moe
from vqmoe_vision.models.compat import misfit_of
from vqmoe_vision.models.fitting import transfer
from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe import layer as layer_module
from vqmoe_vision.moe.raw_patches import image_reader

from ..models.conftest import TINY, fit_state, make

METHOD = next(name for name, method in METHODS.items() if method.needs_features)


def dense(**kwargs: Any) -> Any:
    return timm.create_model('vit_tiny_patch16_224', **{**TINY, **kwargs})


def features(model: nn.Module, images: Tensor) -> Tensor:
    return image_reader(model).features(images)


POOLS = [
    {},
    {'class_token': False, 'global_pool': 'avg'},
    {'reg_tokens': 2},
    {'class_token': False, 'global_pool': 'map'},
    {'global_pool': 'prr'},
    {'global_pool': 'avg', 'pool_include_prefix': True},
]


@pytest.mark.parametrize('kwargs', POOLS)
@torch.no_grad()
def test_features_are_those_of_the_dense_model(images: Tensor, kwargs: dict) -> None:
    source = dense(**kwargs).eval()
    tokens, state = source.forward_features(images), source.state_dict()
    # the mean over patches after the last norm, or the norm of the mean
    expected = source.fc_norm(tokens[:, source.num_prefix_tokens :].mean(dim=1))
    loaded, upcycled, converted = make(METHOD, **kwargs), make(METHOD, **kwargs), source
    load_features(loaded, state, 'dense.pth')
    upcycled.load_state_dict(transfer(upcycled, state, 'dense.pth')[0], strict=False)
    convert_to_moe(converted, METHOD)
    for model in (loaded, upcycled, converted):
        torch.testing.assert_close(features(model.train(), images), expected)
        assert not image_reader(model).fitted


def loaded(model: nn.Module, strict: bool, assign: bool = False) -> nn.Module:
    other = make(METHOD, num_clusters=2, device='meta' if assign else None)
    other.load_state_dict(model.state_dict(), strict=strict, assign=assign)
    return other.train()


AGAIN = {
    'itself': lambda model: model,
    'copy': copy.deepcopy,
    'pickle': lambda model: pickle.loads(pickle.dumps(model)),
    'strict': lambda model: loaded(model, strict=True),
    'lenient': lambda model: loaded(model, strict=False),
    'assigned': lambda model: loaded(model, strict=True, assign=True),
    'double': lambda model: model.double().float(),
}


@pytest.mark.parametrize('fitted', [True, False])
@pytest.mark.parametrize('again', AGAIN.values(), ids=AGAIN)
def test_a_model_knows_whether_it_is_fitted_wherever_it_comes_from(
    images: Tensor, again: Callable, fitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_module, '_said', set())  # as if nothing had been warned of yet
    model = make(METHOD, num_clusters=2)
    if fitted:
        fit_reader(model, [images])
    model = again(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        model(images)
    said = [w for w in caught if 'not fitted to the training set' in str(w.message)]
    assert len(said) == (not fitted)
    assert bool(image_reader(model).fitted) == fitted


def moved(how: str, model: nn.Module, sizes: dict[str, Any], folder: Path) -> Any:
    """A model of other sizes with the weights of one."""
    if how == 'folder':
        save_for_hf(model, folder, model_args={**TINY, **sizes}, safe_serialization=True)
        return timm.create_model(f'local-dir:{folder}', pretrained=True)
    again, state = make(METHOD, **sizes), model.state_dict()
    if how == 'path':
        torch.save(state, folder.with_suffix('.pth'))
        return make(METHOD, checkpoint_path=str(folder.with_suffix('.pth')), **sizes)
    if how == 'fitted':
        assert misfit_of(again, state) == ''
        sizes_of_images = [tuple(model.patch_embed.img_size)]
        state = fit_state(again, state, 'f.pth', sizes_of_images)[0]
    if how == 'cast':  # which averages and tools that cast whole files do
        state = {name: value.float() for name, value in state.items()}
    again.load_state_dict(state, assign=how == 'assigned')
    return again


@pytest.mark.parametrize('how', ['folder', 'path', 'assigned', 'cast', 'fitted'])
@pytest.mark.parametrize(
    ('before', 'after'),
    [
        ({}, {'img_size': 48}),
        ({'img_size': (32, 64)}, {'img_size': (64, 32)}),  # as many positions
        ({'no_embed_class': True, 'reg_tokens': 2}, {'img_size': 16, 'patch_size': 4}),
        ({'img_size': 30, 'dynamic_img_size': True, 'dynamic_img_pad': True}, {'img_size': 44}),
    ],
)
def test_a_network_keeps_the_size_that_clusters_were_fitted_at(
    before: dict, after: dict, how: str, tmp_path: Path
) -> None:
    model, images = make(METHOD, **before), torch.randn(8, 3, 32, 64)
    fit_reader(model, [images.repeat(8, 1, 1, 1) + torch.randn(64, 3, 32, 64)])
    network, expected = image_reader(model).network, features(model, images)
    model.set_input_size(**after)
    assert torch.equal(features(model, images), expected)
    again = moved(how, model, {**before, **after}, tmp_path / 'model')
    reader = image_reader(again)
    assert reader.network.sizes == tuple(reader.sizes.tolist()) == network.sizes
    assert list(reader.parameters()) == [] and reader.sizes.dtype == torch.int64
    assert torch.equal(features(again, images), expected)
    small = torch.randn(2, 3, *model.patch_embed.img_size)
    assert torch.equal(again.eval()(small), model.eval()(small))


MISTAKES: list[tuple[Any, str]] = [
    (lambda model: load_features(model, dense(embed_dim=48).state_dict(), 'f'), r'\(1, 1, 48\)'),
    (lambda model: load_features(model, dense(depth=5).state_dict(), 'f'), r'unexpected keys: '),
    (lambda model: load_features(model, dense(depth=3).state_dict(), 'f'), r'missing keys: '),
    (lambda model: load_features(model, make('smoe').state_dict(), 'f'), "'f' has experts"),
    (lambda model: load_features(model, 'dense.pth', 'f'), 'state_dict='),
    (lambda model: fit_reader(model, [torch.zeros(3, 32, 32)]), 'batches='),
    (lambda model: fit_reader(model, [torch.full((8, 3, 32, 32), torch.nan)]), 'features='),
    (lambda model: fit_reader(model, [torch.zeros(3, 3, 32, 32)]), 'num_clusters=4 .* at most 3'),
    (lambda model: fit_reader(make('smoe'), []), 'model='),
    (lambda model: fit_state(model, make(METHOD).state_dict(), 'f'), r'cluster_embed is \(64, 32'),
]


@pytest.mark.parametrize(('call', 'said'), MISTAKES)
def test_mistakes_change_nothing(call: Callable, said: str) -> None:
    model = make(METHOD, num_clusters=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        call(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
