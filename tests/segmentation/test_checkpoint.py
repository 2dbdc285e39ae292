from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.logging import HistoryBuffer
from mmseg.models import VisionTransformer as MMSegViT
from mmseg.registry import MODELS
from safetensors.torch import save_file

from vqmoe_vision.segmentation.checkpoint import fit_state, read_image_sizes, read_state

from .conftest import TINY, tiny_backbone


def state_of(name: str = 'vit_tiny_vqmoe', **kwargs: Any) -> dict[str, torch.Tensor]:
    experts = {} if 'patch16' in name else {'num_experts': 2}
    return timm.create_model(name, **{**TINY, 'num_classes': 3, **experts, **kwargs}).state_dict()


def model_of(name: str = 'vit_tiny_vqmoe', **kwargs: Any) -> Any:
    return MODELS.build(tiny_backbone(name, **kwargs)).model


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize('prefix', ['model.', 'backbone.model.', ''])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_every_source_is_loaded_whole(prefix: str, suffix: str, tmp_path: Path) -> None:
    state, path = prefixed(prefix, state_of()), tmp_path / f'a{suffix}'
    if prefix.startswith('backbone'):
        state['decode_head.cls_emb'] = torch.zeros(1)
    if suffix == '.pth':
        # what a run of mmengine leaves: weights beside the history of its log
        history = HistoryBuffer([1.0], [1])
        torch.save({'state_dict': state, 'message_hub': {'loss': history}}, path)
    else:
        save_file(state, path)
    model = model_of()
    fitted, notes = fit_state(model, read_state(str(path)), 'a')
    assert fitted.keys() == model.state_dict().keys()
    assert all(torch.equal(fitted[name], state[prefix + name]) for name in fitted)
    assert notes == [f'a: loaded {len(fitted)} of the {len(fitted)} tensors of the backbone']


def test_position_embeddings_are_resized() -> None:
    model = model_of(img_size=(32, 64))
    fitted, notes = fit_state(model, state_of(), 'a')
    assert fitted['pos_embed'].shape == model.pos_embed.shape == (1, 4 * 8 + 1, 12)
    assert notes[0] == 'a: pos_embed resized from (1, 17, 12) to (1, 33, 12)'


def test_position_embeddings_of_an_oblong_image_are_resized() -> None:
    # 16 positions of (16, 64) pixels are no 4 x 4 grid, though there are as many
    state = state_of(img_size=(16, 64))
    grid = torch.arange(8.0).expand(2, 8)  # a ramp along the width
    state['pos_embed'][0, 1:] = grid.flatten()[:, None]
    fitted, _ = fit_state(model_of(), state, 'a', [(224, 224), (16, 64)])
    found = fitted['pos_embed'][0, 1:, 0].unflatten(0, (4, 4))
    assert (found.diff(dim=1) > 1).all()
    torch.testing.assert_close(found.diff(dim=0), torch.zeros(3, 4), atol=1e-5, rtol=0)


def test_positions_of_an_oblong_image_stay_where_the_size_does() -> None:
    # 7 x 28 positions, as many as the 14 x 14 of the model's default size
    state = state_of(img_size=(56, 224))
    state['pos_embed'].normal_()
    fitted, _ = fit_state(model_of(img_size=(56, 224)), state, 'a', [(56, 224)])
    torch.testing.assert_close(fitted['pos_embed'], state['pos_embed'], rtol=0, atol=0)


def test_positions_of_an_unknown_grid_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'a' .* pos_embed is \(1, 9, 12\), and of which img_size"
    ):
        fit_state(model_of(), state_of(img_size=(16, 32)), 'a')


def test_image_size_is_read_from_the_config_of_a_run(tmp_path: Path) -> None:
    path = str(tmp_path / 'a.pth')
    config = 'model = dict(\n    img_size=(\n        352,\n        480,\n    ))\nimg_size=64'
    torch.save({'state_dict': state_of(), 'meta': {'cfg': config}}, path)
    assert read_image_sizes(path) == [(352, 480), (64, 64)]
    torch.save({'state_dict': state_of(), 'meta': {'cfg': 'img_size=[16, 64]'}}, path)
    assert read_image_sizes(path) == [(16, 64)]
    torch.save(state_of(), path)
    assert read_image_sizes(path) == []
    save_file(state_of(), tmp_path / 'a.safetensors')
    assert read_image_sizes(str(tmp_path / 'a.safetensors')) == []


@pytest.mark.parametrize('prefix', ['backbone.', ''])
def test_weights_of_mmsegs_own_backbone_compute_the_same(prefix: str) -> None:
    torch.manual_seed(0)
    theirs = MMSegViT(
        img_size=32, patch_size=8, embed_dims=12, num_layers=2, num_heads=3, final_norm=True,
        norm_cfg=dict(type='LN', eps=1e-6),
    )  # fmt: skip
    theirs.eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    loaded = prefixed(prefix, theirs.state_dict())
    backbone = MODELS.build(tiny_backbone('vit_tiny_patch16_224')).eval()
    fitted, notes = fit_state(backbone.model, loaded, 'a')
    backbone.model.load_state_dict(fitted)
    assert notes == [f'a: loaded {len(fitted)} of the {len(fitted)} tensors of the backbone']
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(backbone(image)[0], theirs(image)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('before', 'after'), [(2, 6), (6, 2)])
def test_slots_of_softmoe_are_resized(before: int, after: int) -> None:
    state = state_of('vit_tiny_softmoe', slots_per_expert=before)
    model = model_of('vit_tiny_softmoe', slots_per_expert=after).eval()
    fitted, notes = fit_state(model, state, 'a')
    assert any('slot_embed resized' in note for note in notes)
    model.load_state_dict(fitted)
    slots = fitted['blocks.1.mlp.slot_embed'].unflatten(0, (2, after))
    source = state['blocks.1.mlp.slot_embed'].unflatten(0, (2, before))
    if after < before:
        torch.testing.assert_close(slots, source[:, [0, 3]], rtol=0, atol=0)
        return
    assert len(slots.flatten(0, 1).unique(dim=0)) == 2 * after  # no two stay equal for ever
    # three copies of each slot answer as one, up to the hundredth by which they differ
    original = model_of('vit_tiny_softmoe', slots_per_expert=before).eval()
    original.load_state_dict(fit_state(original, state, 'a')[0])
    tokens = torch.randn(1, 16, 12)
    found, expected = (m.blocks[1].mlp(tokens) for m in (model, original))
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_full_form_starts_the_discrete_form() -> None:
    fitted, notes = fit_state(model_of(form='discrete'), state_of(), 'a')
    assert 'blocks.1.mlp.quantizer.codebook.embed' in fitted
    assert 'unused: blocks.1.mlp.router.weight, blocks.1.mlp.gate.weight' in notes[-1]


def test_norm_of_averaged_features_becomes_the_final_norm() -> None:
    options = dict(class_token=False)
    state = state_of(global_pool='avg', **options)
    state['fc_norm.bias'] += 1
    fitted, notes = fit_state(model_of(**options), state, 'a')
    torch.testing.assert_close(fitted['norm.bias'], torch.ones(12))
    assert 'a: fc_norm becomes norm' in notes


def test_dense_weights_start_a_model_with_experts_and_the_rest_is_listed() -> None:
    fitted, notes = fit_state(model_of(), state_of('vit_tiny_patch16_224'), 'a')
    assert 'blocks.0.mlp.fc1.weight' in fitted
    assert not any(name.startswith('blocks.1.mlp') for name in fitted)
    missing, unused = notes[-2:]
    assert 'not in the checkpoint' in missing and 'blocks.1.mlp.experts.fc1.weight' in missing
    assert 'unused: blocks.1.mlp.fc1.weight' in unused


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('vit_tiny_vqmoe', dict(embed_dim=24), r'another size: .*cls_token is \(1, 1, 24\), the'),
        ('vit_tiny_vqmoe', dict(num_experts=4), r'another size: .*\(4, .*has \(2, '),
        (
            'vit_tiny_smoe',
            {},
            'another MoE method: only it has nothing; only the model has .*quantizer',
        ),
        (
            'vit_tiny_stablemoe',
            {},
            'another MoE method: only it has .*router.*; only the model has',
        ),
        (
            'vit_tiny_vqmoe',
            dict(class_token=False, global_pool='avg'),
            'only the model has cls_token',
        ),
    ],
)
def test_what_does_not_fit_is_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        fit_state(model_of(), state_of(name, **options), 'a')
    assert '\n' not in str(caught.value)


def test_no_matching_key_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'a' has no key of the model: it has conv.weight; the"):
        fit_state(model_of(), {'conv.weight': torch.zeros(1)}, 'a')


def test_files_that_are_not_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='does not exist'):
        read_state(str(tmp_path / 'none.pth'))
    for name in ('text.pth', 'text.safetensors'):
        (tmp_path / name).write_text('this is no checkpoint')
        with pytest.raises(ValueError, match='is damaged'):
            read_state(str(tmp_path / name))
    torch.save({'state_dict': {}, 'code': prefixed}, tmp_path / 'code.pth')
    with pytest.raises(ValueError, match='holds more than weights'):
        read_state(str(tmp_path / 'code.pth'))
