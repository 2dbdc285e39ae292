"""timm's own vision transformers by name, dense and with experts in the place of their MLPs."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from vqmoe_vision.classification import Classifier
from vqmoe_vision.moe import METHODS

SIZES: Any = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4)
DINOV3 = 'vit_small_patch16_dinov3'
HOSTS = ('vit_tiny_patch16_224', 'deit3_small_patch16_224', DINOV3)
# methods that look at raw patches have them of timm's `VisionTransformer` alone
PAIRS = [
    (host, method)
    for host in HOSTS
    for method in METHODS
    if host != DINOV3 or METHODS[method].read_patches is None
]

EXACT = [
    (host, method, options)
    for host, method in PAIRS
    for options in METHODS[method].config.EXACT_UPCYCLING.values()
]


def build(host: str, method: str | None = None, **kwargs: Any) -> Any:
    """A classifier of a host; `moe` in `kwargs` has options of the method."""
    moe = {**kwargs.pop('moe', {}), 'method': method} if method else None
    return Classifier(host, moe=moe, **{**SIZES, **kwargs})


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 16, 16), torch.arange(4)


def saved(host: str, path: Path, **kwargs: Any) -> Any:
    """A dense model of timm, no tensor of which is as it started, and its file."""
    model: Any = timm.create_model(host, **{**SIZES, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    torch.save(model.state_dict(), path)
    return model


def start(way: str, path: str) -> dict[str, Any]:
    if way == 'pretrained':
        return dict(pretrained=True, pretrained_cfg_overlay=dict(file=path, num_classes=4))
    return {way: path}


@pytest.mark.parametrize('host, method', PAIRS)
def test_a_host_with_experts_by_name_trains(host, method, tmp_path):
    given: dict[str, Any] = {}
    if METHODS[method].needs_features:
        saved(host, tmp_path / 'dense.pth')
        given['features'] = str(tmp_path / 'dense.pth')
    model = build(host, method, **given)
    model.init_weights()
    losses = model(*batch(), mode='loss')
    total, _ = model.parse_losses(losses)
    total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    layer = model.model.blocks[1].mlp
    auxiliary = [name for name in losses if name.startswith('blocks.1.mlp/')]
    assert bool(auxiliary) == layer.needs_collecting
    logged = model.logged_statistics.summary()
    assert ('blocks.1.mlp/load_max' in logged) == hasattr(layer, 'router')


@pytest.mark.parametrize('way', ['pretrained', 'checkpoint_path', 'upcycle'])
def test_a_training_starts_from_one_place(way, tmp_path):
    path = str(tmp_path / 'dense.pth')
    saved(HOSTS[0], tmp_path / 'dense.pth')
    host = HOSTS[0] if way != 'upcycle' else 'vit_tiny_smoe'
    # a test needs neither of them
    model = build(host, checkpoint=path, **start(way, path))
    with pytest.raises(ValueError, match=f'^{way}=.* is not possible: .* with checkpoint=.*dense'):
        model.init_weights()


def test_files_of_dinov3s_authors_are_understood(tmp_path):
    source = saved(DINOV3, tmp_path / 'timm.pth', num_classes=0)
    theirs = {'reg_token': 'storage_tokens', 'gamma_1': 'ls1.gamma', 'gamma_2': 'ls2.gamma'}
    state = source.state_dict()
    for ours, name in theirs.items():
        state = {key.replace(ours, name): value for key, value in state.items()}
    extra = {'mask_token': torch.zeros(1, 32), 'rope_embed.periods': torch.ones(8)}
    torch.save({**state, **extra}, tmp_path / 'theirs.pth')
    model = build(DINOV3, checkpoint=str(tmp_path / 'theirs.pth')).eval()
    model.init_weights()
    images = batch()[0]
    found, expected = model.model.forward_features(images), source.forward_features(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize('host, method, options', EXACT)
@pytest.mark.parametrize('way', ['checkpoint', 'pretrained', 'checkpoint_path'])
def test_it_begins_with_the_answers_of_dense_weights(host, method, options, way, tmp_path):
    path = tmp_path / 'dense.pth'
    source = saved(host, path)
    model = build(host, method, moe=options, **start(way, str(path))).eval()
    torch.manual_seed(7)  # another start than the source had
    model.init_weights()
    images = batch()[0]
    torch.testing.assert_close(model(images), source(images), rtol=1e-5, atol=1e-5)
    report = model.model.weights_report
    assert report.copied['blocks.1.mlp.experts.fc1.weight'] == 'blocks.1.mlp.fc1.weight'
