"""MoCLE against a plain reading of its equations, and what holds of clusters in any training."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.registry import MODELS
from timm.models import save_for_hf
from torch import Tensor, nn

from vqmoe_vision.contrib import mocle
from vqmoe_vision.contrib.mocle import ClusterRouter, Clusters, MoCLEConfig, fit_reader
from vqmoe_vision.engine.checkpoint import read_state
from vqmoe_vision.engine.cli import load_config, train
from vqmoe_vision.engine.model import scope_of
from vqmoe_vision.models import convert_to_moe
from vqmoe_vision.models.fitting import transfer
from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe import layer as layer_module
from vqmoe_vision.moe.raw_patches import Host, RawPatches, image_reader

from .. import cases, refused
from ..engine.tiny import DIGITS
from ..models.conftest import TINY, dense, fit_state, make
from ..moe.by_hand import assert_by_hand, expert
from ..moe.conftest import OneLayer as make_layer
from ..moe.conftest import Pixels
from ..runs import leave_dense
from ..soak.kinds import FOUR_SCENES, SCENES, same

D, E = 8, 4


def naive(net, x):
    """Images (B, N, D), one token after the other."""
    out, router, experts = torch.zeros_like(x), net.layer.router, net.layer.experts
    for b, image in enumerate(x):
        distances = (net.reader.centroids - image.detach().mean(dim=0)).norm(dim=1)
        embedding = router.cluster_embed[distances.argmin()]
        scores = (router.weight @ embedding + router.bias) / router.config.temperature
        gates = scores.exp() / scores.exp().sum()
        e = int(gates.argmax())
        for t, token in enumerate(image):
            own, universal = expert(experts, e, token), expert(experts, E - 1, token)
            out[b, t] = gates[e] * own + (1 - gates[e]) * universal
    return out


@pytest.mark.parametrize('num_tokens', [1, 6])
def test_output_and_every_gradient(num_tokens):
    # at 0.05 the gates of the tests' spread routers are 0 and 1
    net = make_layer('mocle', router_noise=0.0, temperature=1.0, num_clusters=5)
    assert_by_hand(net, lambda x: naive(net, x), torch.randn(6, num_tokens, D))


def router_of(clusters, **options):
    """A router of images of these clusters, with logits so near that noise decides."""
    patches = RawPatches()
    patches.value = torch.tensor(clusters)
    config = MoCLEConfig(num_experts=3, num_clusters=2, **options)
    router = ClusterRouter(2, config, Host(1, raw_patches=patches))
    router.cluster_embed.data.mul_(0.02)
    router.bias.data.zero_()
    return router


def test_known_answer():
    # Embeddings (1, 0) and (0, 1); logits of cluster 0: (0.05, 0), of cluster 1: (0, 0.1). Over
    # tau = 0.05 these are (1, 0) and (0, 2): sigmoid(1) = 0.731059 and sigmoid(2) = 0.880797.
    router = router_of([0, 1, 0]).eval()
    router.cluster_embed.data = torch.eye(2)
    router.weight.data = torch.tensor([[0.05, 0.0], [0.0, 0.1]])
    routing = router(torch.randn(3, 2, 2))
    assert routing.indices.tolist() == [[0, 2]] * 2 + [[1, 2]] * 2 + [[0, 2]] * 2
    first, second = [0.731059, 0.268941], [0.880797, 0.119203]
    expected = torch.tensor([first, first, second, second, first, first])
    torch.testing.assert_close(routing.weights, expected, rtol=0, atol=1e-6)
    assert routing.losses == {}
    assert routing.stats['gate'].item() == pytest.approx((2 * 0.731059 + 0.880797) / 3)
    assert routing.stats['cluster_usage'].tolist() == pytest.approx([2 / 3, 1 / 3])


def test_noise_is_a_tenth_in_the_logits_and_drawn_from_torchs_generator():
    # Two experts of equal logits: the gate is sigmoid(|a - b| / tau) of two draws; the difference
    # has a standard deviation of 0.1 * sqrt(2).
    router = router_of([0] * 20000, temperature=1.0)
    router.weight.data.zero_()
    gates = []
    for _ in range(2):
        torch.manual_seed(3)
        gates.append(router(torch.zeros(20000, 1, 2)).weights[:, 0])
    assert torch.equal(*gates)
    spread = gates[0].logit().square().mean().sqrt().item()
    # of 20,000 draws the estimate is within 0.5 % one time in two: 3 % never fails by chance
    assert spread == pytest.approx(0.1 * 2**0.5, rel=0.03)


def test_blobs_become_clusters_and_an_unknown_image_has_the_nearest():
    blobs = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    features = blobs.repeat_interleave(20, dim=0) + 0.1 * torch.randn(60, 2)
    reader, again = (Clusters(MoCLEConfig(num_clusters=3), Pixels(1, 2)) for _ in range(2))
    state = torch.get_rng_state()
    counts = reader.fit(features)
    assert torch.equal(torch.get_rng_state(), state), 'k-means has draws of its own'
    assert counts.tolist() == [20] * 3
    found = reader(features[..., None, None], (1, 1)).view(3, 20)
    assert torch.equal(found, found[:, :1].expand_as(found)) and len(found.unique()) == 3
    unknown = torch.tensor([[4.0, 1.0], [6.0, 1.0], [-3.0, 30.0]])[..., None, None]
    assert torch.equal(reader(unknown, (1, 1)), found[:, 0])
    again.fit(features)
    assert torch.equal(again.centroids, reader.centroids)


def test_a_network_is_frozen_whatever_the_model_does():
    network = Pixels(2, 4, nn.Linear(12, 4), nn.Dropout(0.5))
    reader = Clusters(MoCLEConfig(num_clusters=2), network).train()
    assert reader.training and not any(part.training for part in network.modules())
    assert list(reader.parameters()) == [] and set(network.state_dict()) == {'1.weight', '1.bias'}
    images = torch.randn(3, 3, 2, 2, requires_grad=True)
    features = reader.features(images)
    assert not features.requires_grad and torch.equal(features, reader.features(images))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(features, reader.features(images))


METHOD = next(name for name, method in METHODS.items() if method.needs_features)


def features(model: nn.Module, images: Tensor) -> Tensor:
    return image_reader(model).features(images)


@cases(
    'kwargs',
    {'reg_tokens': 2},
    {'class_token': False, 'global_pool': 'map'},
    {'global_pool': 'prr'},
    {'global_pool': 'avg', 'pool_include_prefix': True},
)
@torch.no_grad()
def test_features_are_those_of_the_dense_model(images, kwargs):
    source = dense(**kwargs)
    tokens, state = source.forward_features(images), source.state_dict()
    expected = source.fc_norm(tokens[:, source.num_prefix_tokens :].mean(dim=1))
    loaded, upcycled, converted = make(METHOD, **kwargs), make(METHOD, **kwargs), source
    mocle.load_features(loaded, state, 'dense.pth')
    upcycled.load_state_dict(transfer(upcycled, state, 'dense.pth')[0], strict=False)
    convert_to_moe(converted, METHOD)
    for model in (loaded, upcycled, converted):
        torch.testing.assert_close(features(model.train(), images), expected)
        assert not image_reader(model).fitted


def loaded(model: nn.Module, assign: bool = False) -> nn.Module:
    other = make(METHOD, num_clusters=2, device='meta' if assign else None)
    other.load_state_dict(model.state_dict(), assign=assign)
    return other.train()


AGAIN = {
    'itself': lambda model: model,
    'copy': copy.deepcopy,
    'pickle': lambda model: pickle.loads(pickle.dumps(model)),
    'loaded': lambda model: loaded(model),
    'assigned': lambda model: loaded(model, assign=True),
    'double': lambda model: model.double().float(),
}


@pytest.mark.parametrize('fitted', [True, False])
@pytest.mark.parametrize('again', AGAIN.values(), ids=AGAIN)
def test_a_model_knows_whether_it_is_fitted_wherever_from(images, again, fitted, monkeypatch):
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
    if how == 'cast':  # which averages and tools that cast whole files do
        state = {name: value.float() for name, value in state.items()}
    again.load_state_dict(state, assign=how == 'assigned')
    return again


@cases(
    'before, after',
    ({}, {'img_size': 48}),
    ({'img_size': (32, 64)}, {'img_size': (64, 32)}),  # as many positions
    ({'no_embed_class': True, 'reg_tokens': 2}, {'img_size': 16, 'patch_size': 4}),
    ({'img_size': 30, 'dynamic_img_size': True, 'dynamic_img_pad': True}, {'img_size': 44}),
)
def test_a_network_keeps_the_size_that_clusters_were_fitted_at(before, after, tmp_path):
    model, images = make(METHOD, **before), torch.randn(8, 3, 32, 64)
    fit_reader(model, [images.repeat(8, 1, 1, 1) + torch.randn(64, 3, 32, 64)])
    network, expected = image_reader(model).network, features(model, images)
    model.set_input_size(**after)
    assert torch.equal(features(model, images), expected)
    for how in ('folder', 'path', 'assigned', 'cast'):
        again = moved(how, model, {**before, **after}, tmp_path / 'model')
        reader = image_reader(again)
        assert reader.network.sizes == tuple(reader.sizes.tolist()) == network.sizes, how
        assert list(reader.parameters()) == [] and reader.sizes.dtype == torch.int64
        assert torch.equal(features(again, images), expected), how
        small = torch.randn(2, 3, *model.patch_embed.img_size)
        assert torch.equal(again.eval()(small), model.eval()(small)), how


@cases(
    'call, said',
    (lambda m: mocle.load_features(m, dense(embed_dim=48).state_dict(), 'f'), r'\(1, 1, 48\)'),
    (lambda m: mocle.load_features(m, dense(depth=5).state_dict(), 'f'), r'unexpected keys: '),
    (lambda m: mocle.load_features(m, make('smoe').state_dict(), 'f'), "'f' has experts"),
    (lambda m: fit_reader(m, [torch.zeros(3, 32, 32)]), 'batches='),
    (lambda m: fit_reader(m, [torch.full((8, 3, 32, 32), torch.nan)]), 'features='),
    (lambda m: fit_reader(m, [torch.zeros(3, 3, 32, 32)]), 'num_clusters=4 .* at most 3'),
    (lambda m: fit_state(m, make(METHOD).state_dict(), 'f'), r'cluster_embed is \(64, 32'),
)
def test_mistakes_change_nothing(call, said):
    model = make(METHOD, num_clusters=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refused(said, call, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


SIZES = 'patch_size=16, embed_dim=12, depth=2, num_heads=3'
MOE = 'moe=dict(_delete_=True, num_experts=3, num_clusters=4)'
CLASSIFICATION = f"""
_base_ = {str(DIGITS)!r}
experiment_name = NAME
model = dict(model_name='vit_tiny_{METHOD}', {SIZES}, {MOE})
train_dataloader = dict(batch_size=600)
train_cfg = dict(max_epochs=1)
"""
SEGMENTATION = f"""
_base_ = {str(SCENES)!r}
experiment_name = NAME
model = dict(
    backbone=dict(model_name='vit_tiny_{METHOD}', {SIZES}, {MOE}), decode_head=dict(num_layers=1)
)
{FOUR_SCENES}
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=-1))
"""
READER = '.reader.'


def write(folder: Path, text: str) -> str:
    (folder / 'tiny.py').write_text(text.replace('NAME', repr(folder.name)))
    return str(folder / 'tiny.py')


def part(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {key.partition(name)[2]: value for key, value in state.items() if name in key}


def test_clusters_come_first_and_a_resumed_run_is_the_same(tmp_path):
    field, files = 'model.backbone', ('iter_1.pth', 'iter_2.pth')
    config, work = write(tmp_path, SEGMENTATION), tmp_path / 'work'
    file = leave_dense(tmp_path / 'dense.pth', config, field)
    train([config, '--work-dir', str(work), '--cfg-options', f'{field}.features={file}'])
    first, last = (read_state(str(work / file)) for file in files)
    assert part(first, READER)['fitted']
    assert len(part(first, READER)['centroids'].unique(dim=0)) == 4
    network, saved = part(first, f'{READER}network.'), read_state(file)
    assert network and all(
        any(key.endswith(name) and torch.equal(value, v) for key, v in saved.items())
        for name, value in network.items()
    )
    assert same(part(first, READER), part(last, READER))
    (work / files[1]).unlink()
    (work / 'last_checkpoint').write_text(files[0])
    named = f'experiment_name=resumed {tmp_path.name}'  # it may start within the same second
    train([config, '--resume', '--work-dir', str(work), '--cfg-options', named])
    assert same(read_state(str(work / files[1])), last)


def test_a_dense_checkpoint_to_start_from_is_enough(tmp_path):
    config, work = write(tmp_path, CLASSIFICATION), tmp_path / 'work'
    file = leave_dense(tmp_path / 'dense.pth', config, 'model')
    command = [config, '--work-dir', str(work), '--cfg-options']
    said = r'^error: features=None is not possible: the checkpoint'
    refused(said, train, [*command, 'experiment_name=refused'], error=SystemExit)
    train([*command, f'model.checkpoint={file}'])
    state = read_state(str(work / 'epoch_1.pth'))
    assert part(state, READER)['fitted']
    assert not torch.equal(state['model.pos_embed'], part(state, READER)['network.pos_embed'])


def test_images_are_normalised_as_the_features_want_it(tmp_path):
    settings = load_config(config := write(tmp_path, CLASSIFICATION))
    kept = torch.tensor([[0.5] * 3, [0.25] * 3])
    file = leave_dense(tmp_path / 'dense.pth', config, 'model', normalization=kept)
    with scope_of(settings):
        model = MODELS.build(settings.model).model
    found = image_reader(model).before_start(file, False, None)
    assert found.std == (0.25,) * 3
    assert image_reader(model).before_start(file, True, found) == found
    other, said = type(found)(found.mean, (0.5,) * 3), r'features=.* weights for images with m'
    refused(said, image_reader(model).before_start, file, True, other)
