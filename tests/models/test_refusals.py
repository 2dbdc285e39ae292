"""Weights of another network or of other experts are refused, and the line names in what."""

import re
from itertools import permutations
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from vqmoe_vision.contrib.int8 import experts_as_linear
from vqmoe_vision.models.create import create_model
from vqmoe_vision.models.fitting import transfer
from vqmoe_vision.models.upcycle import Upcycling
from vqmoe_vision.moe import METHODS

from ..variants import VARIANTS
from .conftest import DENSE, TINY, dense, fit_state, make

CLUSTERS = next(name for name, method in METHODS.items() if method.needs_features)
FORMS = list(permutations(('full', 'discrete', 'continuous'), 2))
DINO = 'vit_small_patch16_dinov3'


def refusal(model: nn.Module, state: dict[str, Tensor]) -> str:
    with pytest.raises(ValueError, match=r"^checkpoint 'f\.pth' ") as caught:
        fit_state(cast(Any, model), state, 'f.pth')
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ('options', 'source', 'said'),
    [
        ({}, dict(embed_dim=64, num_heads=4), r'cls_token is \(1, 1, 64\)'),
        ({}, dict(no_embed_class=True), r'pos_embed is \(1, 16,.*no_embed_class=False'),
        (dict(no_embed_class=True), {}, r'pos_embed is \(1, 17, 32\).*no_embed_class=True'),
        ({}, dict(depth=6), 'unexpected keys: blocks.4.norm1'),
        ({}, dict(depth=3), 'missing keys: blocks.3.norm1'),
        (dict(init_values=0.1), {}, 'missing keys: blocks.0.ls1.gamma'),
        (dict(pre_norm=True), {}, 'unexpected keys: patch_embed.proj.bias'),
        ({}, dict(in_chans=1), r'proj.weight is \(32, 1, 8, 8\), the model'),
        ({}, dict(mlp_ratio=3.7), r'blocks.0.mlp.fc1.weight is \(118, 32\)'),
        ({}, dict(reg_tokens=3), 'unexpected keys: reg_token'),
        ({}, dict(norm_layer='rmsnorm'), 'missing keys: blocks.0.norm1.bias'),
        (dict(norm_layer='rmsnorm'), {}, 'unexpected keys: blocks.0.norm1.bias'),
    ],
)
def test_another_size_or_part_is_named(
    options: dict[str, Any], source: dict[str, Any], said: str
) -> None:
    assert re.search(said, refusal(make('smoe', **options), dense(**source).state_dict()))


@pytest.mark.parametrize('lacking', ['blocks.2.', 'blocks.2.attn.qkv.bias', 'blocks.0.mlp.'])
def test_an_incomplete_file_is_refused(lacking: str) -> None:
    whole = dense().state_dict()
    state = {k: v for k, v in whole.items() if not k.startswith(lacking)}
    assert f'missing keys: {lacking}' in refusal(make('smoe'), state)


def test_a_backbone_may_end_before_its_checkpoint() -> None:
    state = dense(depth=6).state_dict()
    fitted, _ = fit_state(cast(Any, make('smoe', num_classes=0)), state, 'f.pth')
    assert 'blocks.3.norm1.weight' in fitted and 'blocks.4.norm1.weight' not in fitted


@pytest.mark.parametrize(
    ('theirs', 'ours', 'said'),
    [
        (dict(num_clusters=8), dict(num_clusters=4), r'\(8, 32\), the model has \(4, 32\)'),
        (dict(num_experts=4), dict(num_experts=3), r'fc1.weight is \(4, 128, 32\)'),
        (dict(moe_layers=[0, 2]), dict(moe_layers=[1, 2]), 'missing keys: blocks.0.mlp.fc1'),
    ],
)
def test_other_experts_are_named(theirs: dict[str, Any], ours: dict[str, Any], said: str) -> None:
    assert re.search(said, refusal(make(CLUSTERS, **ours), make(CLUSTERS, **theirs).state_dict()))


@pytest.mark.parametrize(
    ('name', 'shape'),
    [
        ('blocks.0.mlp.fc1.weight', (4096,)),
        ('blocks.1.mlp.experts.fc1.weight', (4096,)),
        ('blocks.1.mlp.experts.fc1.bias', ()),
        ('blocks.1.mlp.router.weight', ()),
        ('patch_embed.proj.bias', ()),
        ('reg_token', (5,)),
        ('cls_token', (5,)),
        ('patch_embed.proj.weight', (0, 3, 8, 8)),
    ],
)
def test_tensors_of_impossible_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    model = make(CLUSTERS)
    assert name in refusal(model, {**model.state_dict(), name: torch.zeros(shape)})


@pytest.mark.parametrize(('theirs', 'ours'), FORMS)
def test_another_form_is_refused(theirs: str, ours: str) -> None:
    state = make('vqmoe', form=theirs).state_dict()
    if (theirs, ours) == ('full', 'discrete'):  # takes what it has
        fit_state(cast(Any, make('vqmoe', form=ours)), state, 'f.pth')
    else:
        assert 'blocks.1.mlp' in refusal(make('vqmoe', form=ours), state)


def test_a_dense_model_takes_no_experts(method: str) -> None:
    line = refusal(dense(), make(method).state_dict())
    assert 'missing keys: blocks.1.mlp.fc1' in line and 'unexpected keys: ' in line


def test_weights_of_eight_bits_become_experts() -> None:
    state = {k: v.to(torch.float8_e4m3fn) for k, v in dense().state_dict().items()}
    found, report = transfer(cast(Any, make('smoe')), state, 'f.pth', upcycling=Upcycling())
    assert report.copied
    expected = state['blocks.1.mlp.fc1.weight'].float().expand(4, -1, -1)
    assert torch.equal(found['blocks.1.mlp.experts.fc1.weight'][:4], expected)


def test_arrays_are_no_tensors(tmp_path: Path) -> None:
    state: Any = {name: value.numpy() for name, value in dense().state_dict().items()}
    said = 'cls_token is a ndarray, and weights are tensors'
    assert said in refusal(make('smoe'), state)
    torch.save(state, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=said):
        create_model('vit_tiny_patch16_224', checkpoint_path=str(tmp_path / 'a.pth'), **TINY)


def test_other_methods_are_refused_by_names(method: str) -> None:
    """Unless the tensors fit, as experts of methods whose tensors are the same."""
    state = make(method).state_dict()
    refused = 0
    for other in METHODS:
        try:
            fit_state(cast(Any, make(other)), state, 'f.pth')
        except ValueError as error:
            refused += 1
            assert 'blocks.1.mlp' in str(error)
    assert refused >= len(METHODS) - 3


@pytest.mark.parametrize('variant', VARIANTS)
def test_other_options_are_refused_or_take_all_that_the_model_has(variant: str) -> None:
    method, options = VARIANTS[variant]
    state, model = make(method, **options).state_dict(), make(method)
    try:
        fit_state(cast(Any, model), state, 'f.pth')
    except ValueError as error:
        assert 'blocks.1.mlp' in str(error)
    else:  # slots are fitted, and another form is left out
        assert model.state_dict().keys() <= state.keys()


def test_experts_as_linear_layers_take_their_own(method: str) -> None:
    separate = experts_as_linear(make(method))
    assert 'unexpected keys: ' in refusal(make(method), separate.state_dict())
    assert 'missing keys: ' in refusal(separate, make(method).state_dict())
    fit_state(cast(Any, experts_as_linear(make(method))), separate.state_dict(), 'f.pth')


@pytest.mark.parametrize('num_classes', [0, 10])
@pytest.mark.parametrize('pooling', ['token', 'avg'])
@pytest.mark.parametrize(
    ('host', 'options'), [(DENSE, {}), ('eva02_tiny_patch14_224', {'swiglu_mlp': False})]
)
def test_a_last_norm_that_is_missing_is_a_warning(
    host: str, options: dict[str, Any], pooling: str, num_classes: int
) -> None:
    """As in the weights of a backbone without one."""
    model: Any = dense(host, **options, global_pool=pooling, num_classes=num_classes)
    state = model.state_dict()
    norms = [name for name in state if name.startswith(('norm.', 'fc_norm.'))]
    state = {name: value for name, value in state.items() if name not in norms}
    _, report = transfer(model, state, 'f.pth')
    said = f'the checkpoint has no {", ".join(norms)}: the last norm is as initialised'
    assert len(norms) == 2 and said in report.warnings and said in report.lines()


def test_a_distilled_model_is_known_by_its_token() -> None:
    name = 'deit_tiny_distilled_patch16_224'
    state = dense(name).state_dict()
    assert refusal(make('smoe'), state).endswith('unexpected keys: dist_token')
    assert refusal(dense(name), dense().state_dict()).endswith('missing keys: dist_token')
    fit_state(dense(name), state, 'f.pth')


@pytest.mark.parametrize(
    'name',
    ['beit_base_patch16_224', 'vit_relpos_small_patch16_224', 'vit_srelpos_small_patch16_224',
     'samvit_base_patch16', 'naflexvit_base_patch16_gap', 'vit_small_patch16_18x2_224',
     'vit_tiny_r_s16_p8_224'],
)  # fmt: skip
@pytest.mark.parametrize('host', ['vit_tiny_smoe', DINO])
def test_another_network_is_refused(name: str, host: str) -> None:
    with torch.device('meta'):
        names = timm.create_model(name).state_dict()
    state = {k: torch.zeros(v.shape) for k, v in names.items()}
    assert 'does not fit the model: ' in refusal(timm.create_model(host, **TINY), state)


@pytest.mark.parametrize(
    'name', ['eva02_tiny_patch14_224', 'vit_giant_patch14_dinov2', 'aimv2_large_patch14_224']
)
def test_networks_of_gated_mlps_are_refused(name: str) -> None:
    assert 'does not fit the model' in refusal(make('smoe'), dense(name).state_dict())


class OwnStem(torch.nn.Module):
    """With the tensors of timm's and none of its classes."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any):
        super().__init__()
        stem = timm.layers.PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.proj, self.norm = stem.proj, stem.norm
        self.num_patches, self.grid_size = stem.num_patches, stem.grid_size
        self.patch_size, self.img_size = stem.patch_size, stem.img_size

    def feat_ratio(self) -> int:
        """Pixels of a side of a patch."""
        return self.patch_size[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens."""
        return self.proj(x).flatten(2).transpose(1, 2)


def test_a_stem_of_a_user_takes_what_has_its_tensors(tmp_path: Path) -> None:
    source = dense()
    save_for_hf(source, tmp_path / 'a', model_args=dict(TINY))
    model = make('smoe', upcycle=f'local-dir:{tmp_path}/a', embed_layer=OwnStem)
    assert model.patch_embed.proj.weight.equal(source.patch_embed.proj.weight)
