"""timm's own vision transformers by name, dense and with experts in the place of their MLPs."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from vqmoe_vision.classification import Classifier
from vqmoe_vision.engine.optim import LayerDecayOptimWrapperConstructor
from vqmoe_vision.models import complexity, to_discrete
from vqmoe_vision.moe import METHODS

SIZES: dict[str, Any] = dict(
    img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4
)
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


@pytest.mark.parametrize(('host', 'method'), PAIRS)
def test_a_host_with_experts_by_name_trains(host: str, method: str, tmp_path: Path) -> None:
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
    found, dense = complexity(model.model), complexity(build(host).model)
    mlp = 8 * 32**2
    assert found.params > dense.params + (layer.experts.num_experts - 1) * mlp
    assert found.macs > 0.9 * dense.macs


@pytest.mark.parametrize(('host', 'method'), [(DINOV3, 'smoe'), (HOSTS[0], 'smoe')])
def test_from_scratch_it_starts_as_the_dense_model_and_its_experts_differ(
    host: str, method: str
) -> None:
    models = [build(host, method), build(host)]
    for model in models:
        torch.manual_seed(3)
        model.init_weights()
    sparse, dense = (model.model for model in models)
    own = sparse.state_dict()
    shared = {k: v for k, v in dense.state_dict().items() if not k.startswith('blocks.1.mlp.')}
    for name, value in shared.items():
        assert torch.equal(own[name], value), name
    first, second, *_ = sparse.blocks[1].mlp.experts.fc2.weight.detach()
    assert not torch.equal(first, second)
    # as wide as the MLPs in their place, which an `Eva` scales by depth; 4,096 draws are within 5 %
    expected = dense.blocks[1].mlp.fc2.weight.std().item()
    assert first.std().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(('host', 'method', 'options'), EXACT)
@pytest.mark.parametrize('way', ['checkpoint', 'pretrained', 'checkpoint_path'])
def test_it_begins_with_the_answers_of_dense_weights(
    host: str, method: str, options: dict[str, Any], way: str, tmp_path: Path
) -> None:
    path = tmp_path / 'dense.pth'
    source = saved(host, path)
    given: dict[str, Any] = {way: str(path)}
    if way == 'pretrained':
        given = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=4))
    model = build(host, method, moe=options, **given).eval()
    torch.manual_seed(7)  # another start than the source had
    model.init_weights()
    images = batch()[0]
    torch.testing.assert_close(model(images), source(images), rtol=1e-5, atol=1e-5)
    report = model.model.weights_report
    assert report.copied['blocks.1.mlp.experts.fc1.weight'] == 'blocks.1.mlp.fc1.weight'


@pytest.mark.parametrize(
    ('host', 'method', 'way'),
    [
        (HOSTS[0], 'smoe', 'pretrained'),
        (HOSTS[0], None, 'pretrained'),
        (HOSTS[0], 'smoe', 'checkpoint_path'),
        ('vit_tiny_smoe', None, 'upcycle'),
    ],
)
def test_a_training_starts_from_one_place(
    host: str, method: str | None, way: str, tmp_path: Path
) -> None:
    path = str(tmp_path / 'dense.pth')
    saved(HOSTS[0], tmp_path / 'dense.pth')
    given: dict[str, Any] = {way: path}
    if way == 'pretrained':
        given = dict(pretrained=True, pretrained_cfg_overlay=dict(file=path))
    model = build(host, method, checkpoint=path, **given)  # a test needs neither of them
    with pytest.raises(ValueError, match=f'^{way}=.* is not possible: .* with checkpoint=.*dense'):
        model.init_weights()


@pytest.mark.parametrize('way', ['checkpoint', 'checkpoint_path'])
@pytest.mark.parametrize(
    ('host', 'method'), [(HOSTS[0], None), *PAIRS[:1], ('vit_tiny_smoe', None)]
)
def test_what_is_stated_of_weights_is_before_what_they_say(
    host: str, method: str | None, way: str, tmp_path: Path
) -> None:
    state: Any = timm.create_model(HOSTS[0] if method else host, **SIZES).state_dict()
    bare, run = str(tmp_path / 'bare.pth'), str(tmp_path / 'run.pth')
    torch.save(state, bare)
    own = {f'model.{name}': value for name, value in state.items()}
    torch.save({'state_dict': {**own, 'normalization': torch.full((2, 3), 0.25)}}, run)
    numbers = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    for file in (bare, run):
        model = build(host, method, **{way: file}, pretrained_cfg_overlay=numbers)
        model.init_weights()
        torch.testing.assert_close(
            model.state_dict()['normalization'], torch.tensor([*numbers.values()])
        )
    half = build(host, method, **{way: bare})
    half._arguments['pretrained_cfg_overlay'] = dict(std=numbers['std'])
    message = r'^pretrained_cfg_overlay\.std=.* is not possible: beside .*overlay\.mean'
    with pytest.raises(ValueError, match=message):
        half.init_weights()


def test_experts_of_a_checkpoint_can_be_shaken(tmp_path: Path) -> None:
    saved(DINOV3, tmp_path / 'dense.pth')
    for way in ('checkpoint', 'checkpoint_path'):
        given: dict[str, Any] = {way: str(tmp_path / 'dense.pth')}
        model = build(DINOV3, 'smoe', upcycling=dict(noise=0.1), **given)
        model.init_weights()
        first, second, *_ = model.model.blocks[1].mlp.experts.fc1.weight.detach()
        assert 0 < (first - second).norm() < 0.3 * first.norm()  # 0.1 * sqrt(2) apart


@pytest.mark.parametrize('host', HOSTS)
def test_a_full_run_starts_the_discrete_form(host: str, tmp_path: Path) -> None:
    source = build(host, 'vqmoe').eval()
    path = tmp_path / 'full.pth'
    torch.save({'state_dict': source.state_dict()}, path)
    model = build(host, 'vqmoe', moe=dict(form='discrete'), checkpoint=str(path)).eval()
    torch.manual_seed(7)
    model.init_weights()
    loaded = build(host, 'vqmoe', moe=dict(form='discrete')).eval()
    loaded.load_state_dict(source.state_dict())
    images = batch()[0]
    expected = to_discrete(source)(images)
    assert torch.equal(model(images), expected) and torch.equal(loaded(images), expected)
    assert not any('router' in name for name in model.state_dict())


def test_files_of_dinov3s_authors_are_understood(tmp_path: Path) -> None:
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


def test_patches_of_another_size_are_resized(tmp_path: Path) -> None:
    saved(DINOV3, tmp_path / 'dense.pth', patch_size=4)
    model = build(DINOV3, 'smoe', checkpoint=str(tmp_path / 'dense.pth'))
    model.init_weights()
    assert list(model.model.weights_report.resized) == ['patch_embed.proj.weight']


@pytest.mark.parametrize(
    ('host', 'options', 'message'),
    [
        ('eva02_tiny_patch14_224', dict(moe=dict(method='smoe')), r"'GluMlp' is not .* \(SwiGLU\)"),
        ('deit_tiny_distilled_patch16_224', dict(moe=dict(method='smoe')), 'dense and not wrapped'),
        (DINOV3, dict(moe=dict(top_k=1)), 'moe.method=None is not possible: one of smoe'),
        (DINOV3, dict(moe=dict(method='moe')), "moe.method='moe' is not possible: one of smoe"),
        (DINOV3, dict(moe='smoe'), "moe='smoe' is not possible: a dictionary of options"),
        (DINOV3, dict(moe=dict(method='smoe'), extra_mlps=2), 'extra_mlps=2 is not possible: 0'),
        ('vit_tiny_smoe', dict(moe=dict(method='smoe')), "moe.method='smoe' is not possible"),
    ],
)
def test_what_cannot_be_is_one_line(host: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Classifier(host, **{**SIZES, 'patch_size': 4, **options})
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('host', 'other', 'options', 'message'),
    [
        (DINOV3, HOSTS[0], {}, '(missing|unexpected) keys: .*'),
        (DINOV3, DINOV3, dict(use_abs_pos_emb=True), '(missing|unexpected) keys: .*'),
        (DINOV3, DINOV3, dict(num_reg_tokens=0), 'missing keys: reg_token'),
        (HOSTS[0], DINOV3, {}, r'the names of an Eva .* rotary'),
        (DINOV3, DINOV3, dict(embed_dim=16), 'shapes: cls_token'),
        (
            DINOV3,
            DINOV3,
            dict(swiglu_mlp=True),
            r'shapes: blocks\.0\.mlp\.fc1',
        ),
    ],
)
@pytest.mark.parametrize('method', [None, 'smoe'])
def test_a_checkpoint_of_another_network_is_refused(
    host: str, other: str, options: dict[str, Any], message: str, method: str | None, tmp_path: Path
) -> None:
    saved(other, tmp_path / 'other.pth', **options)
    model = build(host, method, checkpoint=str(tmp_path / 'other.pth'))
    with pytest.raises(ValueError, match=message):
        model.init_weights()


def test_a_dense_eva_is_widened() -> None:
    model: nn.Module = build(DINOV3, extra_mlps=1).model
    assert model.get_submodule('blocks.0.mlp.fc1').weight.shape == (192, 32)


def test_learning_rates_shrink_by_layer() -> None:
    model = build(DINOV3, 'smoe')
    constructor = LayerDecayOptimWrapperConstructor(
        {'optimizer': {'type': 'AdamW', 'lr': 1.0, 'weight_decay': 0.3}}, {'layer_decay': 0.5}
    )
    groups = constructor(model).optimizer.param_groups
    rate = {id(p): group['lr'] for group in groups for p in group['params']}
    rates = {name: rate[id(parameter)] for name, parameter in model.named_parameters()}
    assert rates['model.head.weight'] == 1.0
    assert rates['model.blocks.1.mlp.experts.fc1.weight'] == 0.5
    assert rates['model.patch_embed.proj.weight'] == 0.125
