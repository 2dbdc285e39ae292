"""What is said to fit of files that say little does, and what fits in no way has no advice."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from vqmoe_vision.models import convert_to_moe
from vqmoe_vision.models.create import create_model
from vqmoe_vision.models.transfer import fit_state, transfer

from .conftest import DENSE, TINY, dense, distance, make

SMOE = {'method': 'smoe', 'renormalize': True}


def started(name: str, file: str, **kwargs: Any) -> Any:
    """A host by name with experts, from a file."""
    given = dict(pretrained=True, pretrained_cfg_overlay=dict(file=file))
    return create_model(name, SMOE, **{**TINY, **given, **kwargs}).eval()


@pytest.mark.parametrize('name', ['vit_small_patch14_dinov2', 'vit_small_patch16_dinov3'])
def test_a_host_that_has_layer_scale_by_its_name(
    name: str, tmp_path: Path, images: torch.Tensor
) -> None:
    plain = name.replace('patch14_dinov2', 'patch16_224')
    source = dense(plain)
    state, file = source.state_dict(), str(tmp_path / 'a.pth')
    if 'dinov3' in name:
        state = {k: v for k, v in state.items() if 'gamma' not in k}
    torch.save(state, file)
    with pytest.raises(ValueError, match='only the model has blocks') as caught:
        started(name, file)
    said = re.search(r'; init_values=(\S+) would fit$', str(caught.value))
    if 'dinov3' in name:  # no number takes it away
        assert said is None and 'would fit' not in str(caught.value)
        return
    assert said is not None
    model = started(name, file, init_values=float(said[1]))
    torch.testing.assert_close(model(images), source(images), rtol=1e-5, atol=1e-5)


TOKEN, AVG = dict(global_pool='token'), dict(global_pool='avg')
NO_NORM: dict[str, Any] = dict(final_norm=False)
OF_EVA: dict[str, Any] = dict(use_post_transformer_norm=False, use_fc_norm=False)
BEHIND = [dict(AVG, fc_norm=True), dict(TOKEN, fc_norm=True)]
BEFORE = [dict(TOKEN, fc_norm=False), dict(AVG, fc_norm=False)]
DINO = 'vit_small_patch16_dinov3'
RENAMED = {'fc_norm': 'use_fc_norm'}
ALONE: dict[str, Any] = dict(class_token=False, **AVG)


@pytest.mark.parametrize(
    ('name', 'ours', 'theirs', 'said'),
    [
        (DENSE, {}, dict(fc_norm=True), BEHIND),
        (DENSE, {}, AVG, BEHIND),
        (DENSE, dict(global_pool='map'), {}, BEFORE),
        (DENSE, {}, NO_NORM, [NO_NORM]),
        (DENSE, AVG, NO_NORM, [NO_NORM]),
        (DENSE, AVG, {}, BEFORE),
        (DENSE, dict(fc_norm=True), {}, BEFORE),
        (DENSE, ALONE, dict(ALONE, fc_norm=False), BEFORE[1:]),
        (DINO, {}, dict(TOKEN, use_fc_norm=True), BEHIND),
        (DINO, dict(AVG, use_fc_norm=True), dict(TOKEN, use_fc_norm=False), BEFORE),
        (DINO, {}, OF_EVA, [OF_EVA]),
    ],
    ids=str,
)
def test_each_reading_of_a_head_takes_it_and_one_answers_alike(
    name: str, ours: dict[str, Any], theirs: dict[str, Any], said: list[Any], images: torch.Tensor
) -> None:
    if name == DINO:
        said = [{RENAMED.get(k, k): v for k, v in reading.items()} for reading in said]
    source = dense(name, **theirs)
    state = source.state_dict()
    report = transfer(dense(name, **ours), state, 'a.pth')[1]
    first, *others = [', '.join(f'{k}={v!r}' for k, v in reading.items()) for reading in said]
    text = first + ''.join(f' (or {other})' for other in others)
    assert report.warnings[0].endswith(f'pooled otherwise: {text} would fit')
    distances = []
    for reading in said:
        model = dense(name, **{**ours, **reading})
        fitted, report = transfer(model, state, 'a.pth')
        assert not report.warnings and fitted.keys() == model.state_dict().keys()
        model.load_state_dict(fitted)
        distances.append(distance(model(images), source(images)))
    assert min(distances) < 1e-5 or theirs in (NO_NORM, OF_EVA)


@pytest.mark.parametrize(
    ('name', 'part'),
    [
        ('beit_base_patch16_224', r'blocks\.0\.attn\.relative_position_bias_table'),
        ('vit_relpos_small_patch16_224', r'blocks\.0\.attn\.rel_pos\.mlp'),
        ('vit_srelpos_small_patch16_224', r'shared_rel_pos\.mlp'),
        ('samvit_base_patch16', r'blocks\.0\.attn\.rel_pos_h'),
        ('naflexvit_base_patch16_gap', r'embeds\.'),
    ],
)
@pytest.mark.parametrize('host', ['vit_tiny_smoe', DINO])
def test_another_network_is_refused_at_once(name: str, part: str, host: str) -> None:
    with torch.device('meta'):
        names = timm.create_model(name).state_dict()
    state = {k: torch.zeros(v.shape) for k, v in names.items()}
    message = rf"it has {part}\S* and \d+ more, and is of another network than timm's .* no option"
    with pytest.raises(ValueError, match=message) as caught:
        fit_state(timm.create_model(host, **TINY), state, 'a.pth')
    assert 'would fit' not in str(caught.value)


@pytest.mark.parametrize('no_embed_class', [True, False])
@pytest.mark.parametrize('class_token', [True, False])
def test_positions_tell_whether_registers_have_one(no_embed_class: bool, class_token: bool) -> None:
    pool = {} if class_token else dict(class_token=False, global_pool='avg')
    source = dense(reg_tokens=3, no_embed_class=no_embed_class, **pool)
    with pytest.raises(ValueError, match='only the checkpoint has reg_token; ') as caught:
        fit_state(make('smoe', **pool), source.state_dict(), 'a.pth')
    said = f'; reg_tokens=3, no_embed_class={no_embed_class} would fit'
    assert str(caught.value).endswith(said)
    given = dict(reg_tokens=3, no_embed_class=no_embed_class)
    fit_state(make('smoe', **pool, **given), source.state_dict(), 'a.pth')


def refused(model: Any, state: dict[str, torch.Tensor]) -> str:
    with pytest.raises(ValueError, match=r"^checkpoint 'f\.pth' ") as caught:
        fit_state(model, state, 'f.pth')
    assert '\n' not in str(caught.value)
    return str(caught.value)


SEVERAL: dict[str, Any] = dict(depth=5, mlp_ratio=2.0, init_values=1e-05, qkv_bias=False)


@pytest.mark.parametrize(
    ('name', 'theirs', 'said'),
    [
        (DENSE, dict(SEVERAL, reg_tokens=2, no_embed_class=True), {}),
        (DENSE, dict(ALONE, fc_norm=False, **SEVERAL), {}),
        (DENSE, dict(embed_dim=48, norm_layer='rmsnorm', qk_norm=True, num_heads=3), {}),
        ('vit_tiny_smoe', dict(depth=5, mlp_ratio=2.0, num_experts=3), {}),
        ('vit_tiny_smoe', dict(depth=5, num_experts=3), {}),
        (
            'vit_tiny_smoe',
            dict(embed_dim=64, num_heads=4, mlp_ratio=2.0, num_experts=3),
            dict(num_heads=4),
        ),
        ('test_vit4', {}, {}),
    ],
    ids=str,
)
def test_all_that_differs_is_said_at_once(
    name: str, theirs: dict[str, Any], said: dict[str, Any]
) -> None:
    state = dense(name, **theirs).state_dict()
    line = refused(make('smoe'), state)
    found = re.search(r'; ([^;]*?)( and the num_heads of the checkpoint, .*)? would fit$', line)
    assert found is not None and bool(found[2]) == bool(said)
    options = eval(f'dict({found[1]})')
    assert options.items() >= {k: v for k, v in theirs.items() if k not in said}.items()
    fit_state(make('smoe', **options, **said), state, 'f.pth')


@pytest.mark.parametrize(
    'odd',
    [
        {'reg_token': torch.zeros(5)},
        {'cls_token': torch.zeros(5)},
        {'patch_embed.proj.weight': torch.zeros(0, 3, 8, 8)},
    ],
    ids=lambda odd: '-'.join(odd),
)
def test_tensors_of_impossible_shapes_have_no_advice(odd: dict[str, torch.Tensor]) -> None:
    model, name = make('smoe'), next(iter(odd))
    lines = [refused(model, {**dense().state_dict(), **odd})]
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict({**model.state_dict(), **odd})
    for line in (*lines, str(caught.value)):
        assert name in line and 'Error' not in line


def test_a_stray_tensor_does_not_make_a_file_incomplete() -> None:
    state = {**dense().state_dict(), 'blocks.0.attn.q_norm.weight': torch.ones(4)}
    assert 'incomplete' not in refused(make('smoe'), state)


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


@pytest.mark.parametrize(
    ('lacking', 'options'),
    [
        ('blocks.2.', {}),
        ('blocks.2.', dict(depth=3)),
        ('blocks.2.attn.qkv.bias', {}),
        ('blocks.2.attn.qkv.bias', dict(qkv_bias=False)),
        ('blocks.0.mlp.', {}),
        ('patch_embed.proj.bias', {}),
    ],
)
@pytest.mark.parametrize('name', ['vit_tiny_smoe', DENSE])
def test_an_incomplete_file_is_called_so(lacking: str, options: dict[str, Any], name: str) -> None:
    whole = dense().state_dict()
    state = {k: v for k, v in whole.items() if not k.startswith(lacking)}
    line = refused(dense(name, **options), state)
    first = next(k for k in whole if k.startswith(lacking))
    assert (
        f'; the checkpoint is incomplete, of the network that the rest is of it lacks {first}'
        in line
    )
    assert line.endswith(': whole weights would fit') and '=' not in line.partition('f.pth')[2]


HYBRID = dict(img_size=64, patch_size=8)
# networks of which no experts can be made, and why
NONE = [
    (
        'eva02_tiny_patch14_224',
        {},
        r"blocks\.\d\.mlp='GluMlp' .* gated MLPs \(SwiGLU\) have",
    ),
    ('vit_giant_patch14_dinov2', {}, r"blocks\.\d\.mlp='GluMlp' .* gated MLPs \(SwiGLU\) have"),
    ('aimv2_large_patch14_224', {}, r"blocks\.\d\.mlp='SwiGLU' .* gated MLPs \(SwiGLU\) have"),
    ('vit_small_patch16_18x2_224', {}, r"blocks\.\d='ParallelThingsBlock' .* a block with one MLP"),
    ('vit_pwee_patch16_reg1_gap_256', {}, r"blocks\.\d='ParallelScalingBlock' .* a block with one"),
    ('vit_tiny_r_s16_p8_224', HYBRID, ''),
    (DINO, {}, ''),
]


def known_file(name: str, folder: Path, **options: Any) -> str:
    """Weights beside which timm says what they are of."""
    source = dense(name, **options)
    save_for_hf(source, folder, model_args={**TINY, **options}, safe_serialization=True)
    return f'local-dir:{folder}'


@pytest.mark.parametrize(('name', 'options', 'why'), NONE)
def test_a_network_is_said_to_become_experts_where_it_does(
    name: str, options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r'^checkpoint .* does not fit the model: ') as caught:
        make('smoe', upcycle=known_file(name, tmp_path, **options))
    line, source = str(caught.value), dense(name, **options)
    if why:
        assert re.search(rf'; no experts can be made of it: {why}', line)
        assert 'would fit' not in line and 'moe=dict' not in line
        with pytest.raises(ValueError, match=why):
            convert_to_moe(source, 'smoe')
        return
    assert f"; model_name='{name}' with moe=dict(method='smoe') is that network with" in line
    convert_to_moe(source, 'smoe')
    create_model(name, SMOE, **{**TINY, **options})


@pytest.mark.parametrize(('name', 'options', 'why'), NONE[:4])
def test_files_of_networks_without_experts_have_no_option(
    name: str, options: dict[str, Any], why: str
) -> None:
    line = refused(make('smoe'), dense(name, **options).state_dict())
    assert 'would fit' not in line
    assert 'is a gated MLP (SwiGLU)' in line or 'GLU' not in why


def test_a_hybrid_is_known_by_its_stem() -> None:
    state = dense('vit_tiny_r_s16_p8_224', **HYBRID).state_dict()
    line = refused(make('smoe'), state)
    assert 'has patch_embed.backbone.conv.weight and 2 more, as hybrids' in line
    assert 'in_chans' not in line
    fit_state(create_model('vit_tiny_r_s16_p8_224', SMOE, **{**TINY, **HYBRID}), state, 'f.pth')


def test_norms_that_compute_otherwise_are_named(tmp_path: Path) -> None:
    source = known_file('test_vit4', tmp_path)
    with pytest.raises(ValueError, match=r'norms are RmsNorm, for LayerNorm; .*=1e-06\) would'):
        make('smoe', upcycle=source)
