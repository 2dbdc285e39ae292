from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import checkpoint_filter_fn

from vqmoe_vision.models.compat import misfit

from .conftest import Make, fit_state, make, shaken


def model_of(method: str = 'vqmoe', **kwargs: Any) -> Any:
    """A backbone, unless it gets classes; block 1 is MoE, `method` 'patch16_224' is dense."""
    sizes = dict(embed_dim=12, depth=2, num_heads=3)
    experts = {} if 'patch16' in method else {'num_experts': 2}
    pool = {} if kwargs.get('num_classes') else {'num_classes': 0, 'global_pool': ''}
    return make(method, **{**sizes, **experts, **pool, **kwargs})


def state_of(method: str = 'vqmoe', **kwargs: Any) -> dict[str, torch.Tensor]:
    return model_of(method, **{'num_classes': 3, **kwargs}).state_dict()


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    same = (torch.equal(value, expected[name]) for name, value in found.items())
    return found.keys() == expected.keys() and all(same)


def noisy_state(model: Any) -> dict[str, torch.Tensor]:
    """No tensor as any model starts with."""
    return {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }


def test_every_method_and_preset_goes_through_whole(tiny_variant: Make) -> None:
    state, model = noisy_state(tiny_variant()), tiny_variant()
    fitted, notes = fit_state(model, prefixed('model.', state), 'a')
    assert equal(fitted, state)
    number = len(state)
    assert notes == [
        'a: the head is the one of the checkpoint',
        f'a: loaded {number} of the {number} tensors of the model',
    ]


def test_every_method_and_preset_goes_through_timms_own_filter(
    tiny_variant: Make, tmp_path: Path
) -> None:
    state, path = noisy_state(tiny_variant()), tmp_path / 'a.pth'
    torch.save(state, path)
    model = tiny_variant(checkpoint_path=str(path))
    assert equal(model.state_dict(), state)
    assert equal(checkpoint_filter_fn(state, model), state)
    source = {'file': str(path), 'num_classes': 10}
    pretrained = tiny_variant(pretrained=True, pretrained_cfg_overlay=source)
    assert equal(pretrained.state_dict(), state)


@pytest.mark.parametrize('prefix', ['model.', 'backbone.model.', 'backbone.', ''])
def test_every_source_starts_a_backbone(prefix: str) -> None:
    state, model = state_of(), model_of()
    loaded = prefixed(prefix, state)
    if prefix.startswith('backbone'):
        loaded['decode_head.cls_emb'] = torch.zeros(1)
    fitted, notes = fit_state(model, loaded, 'a')
    assert equal(fitted, {name: state[name] for name in model.state_dict()})
    assert notes == [f'a: loaded {len(fitted)} of the {len(fitted)} tensors of the backbone']


def test_head_of_as_many_classes_is_taken() -> None:
    state = state_of()
    fitted, notes = fit_state(model_of(num_classes=3), state, 'a')
    assert torch.equal(fitted['head.weight'], state['head.weight'])
    assert notes[0] == 'a: the head is the one of the checkpoint'
    assert notes[1:] == [f'a: loaded {len(state)} of the {len(state)} tensors of the model']


@pytest.mark.parametrize(
    ('classes', 'reason'),
    [
        (
            7,
            'shapes: head.weight is (7, 12), the model has (3, 12), '
            'head.bias is (7,), the model has (3,)',
        ),
        (0, 'missing keys: head.weight, head.bias'),
    ],
)
def test_head_of_other_classes_starts_fresh(classes: int, reason: str) -> None:
    model, state = model_of(num_classes=3), state_of(num_classes=classes, global_pool='token')
    fitted, notes = fit_state(model, state, 'a')
    assert fitted.keys() == model.state_dict().keys() - {'head.weight', 'head.bias'}
    assert notes == [
        f'a: the head is a fresh one, {reason}',
        f'a: loaded {len(fitted)} of the {len(fitted)} tensors of the backbone',
    ]


def test_pooling_of_a_classifier_that_pools_otherwise_is_listed() -> None:
    pooled = state_of(global_pool='map')
    notes = fit_state(model_of(num_classes=3), pooled, 'a')[1]
    assert any('unused: attn_pool.latent' in note for note in notes)
    fitted, _ = fit_state(model_of(num_classes=3, global_pool='map'), pooled, 'a')
    assert torch.equal(fitted['attn_pool.latent'], pooled['attn_pool.latent'])
    (note,) = fit_state(model_of(), pooled, 'a')[1]  # a backbone has no use for any head
    assert 'tensors of the backbone' in note


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
    # 14 x 56 positions, as many as the 28 x 28 of the model's default size, 224
    state = state_of(img_size=(112, 448))
    state['pos_embed'].normal_()
    fitted, _ = fit_state(model_of(img_size=(112, 448)), state, 'a', [(112, 448)])
    torch.testing.assert_close(fitted['pos_embed'], state['pos_embed'], rtol=0, atol=0)


def test_positions_of_an_unknown_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'a' .* pos_embed is \(1, 9, 12\)"):
        fit_state(model_of(), state_of(img_size=(16, 32)), 'a')


@pytest.mark.parametrize(('before', 'after'), [(2, 6), (6, 2)])
def test_slots_of_softmoe_are_resized(before: int, after: int) -> None:
    state = state_of('softmoe', slots_per_expert=before)
    model = model_of('softmoe', slots_per_expert=after).eval()
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
    original = model_of('softmoe', slots_per_expert=before).eval()
    original.load_state_dict(fit_state(original, state, 'a')[0])
    tokens = torch.randn(1, 16, 12)
    found, expected = (m.blocks[1].mlp(tokens) for m in (model, original))
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize('channels', [1, 4])
def test_weights_of_coloured_images_take_others(tiny: Make, channels: int, tmp_path: Path) -> None:
    model, path = shaken(tiny(depth=2)), tmp_path / 'colour.pth'
    torch.save(model.state_dict(), path)
    numbers = (0.5,) * channels
    overlay = dict(file=str(path), num_classes=10, mean=numbers, std=numbers)
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay)
    other = tiny(depth=2, in_chans=channels, **options).eval()
    images = torch.randn(2, 3, 32, 32)
    if channels == 1:
        # its weights are sums over channels: a grey image is one in colour with three equal ones
        images[:] = images[:, :1]
        shown = images[:, :1]
    else:
        # red comes again, and all weights are three quarters
        shown = torch.cat([images, images[:, :1]], dim=1)
        images = 0.75 * torch.cat([2 * images[:, :1], images[:, 1:]], dim=1)
    torch.testing.assert_close(other(shown), model(images), rtol=1e-5, atol=1e-5)


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


def test_final_norm_becomes_the_norm_of_averaged_features() -> None:
    state = state_of()
    state['norm.bias'] += 1
    fitted, notes = fit_state(model_of(num_classes=3, global_pool='avg'), state, 'a')
    torch.testing.assert_close(fitted['fc_norm.bias'], torch.ones(12))
    assert notes[0] == 'a: norm becomes fc_norm'


def test_dense_weights_start_a_model_with_experts_and_the_rest_is_listed() -> None:
    fitted, notes = fit_state(model_of(), state_of('patch16_224'), 'a')
    assert 'blocks.0.mlp.fc1.weight' in fitted
    assert not any(name.startswith('blocks.1.mlp') for name in fitted)
    missing, unused = notes[-2:]
    assert 'not in the checkpoint' in missing and 'blocks.1.mlp.experts.fc1.weight' in missing
    assert 'unused: blocks.1.mlp.fc1.weight' in unused


def test_layers_of_blocks_that_the_model_has_not_are_listed() -> None:
    fitted, notes = fit_state(model_of(), state_of(depth=4), 'a')
    assert fitted.keys() == model_of().state_dict().keys()
    assert 'unused: blocks.2.norm1.weight' in notes[-1] and 'blocks.3.mlp.router' in notes[-1]


@pytest.mark.parametrize(
    ('method', 'options', 'message'),
    [
        ('vqmoe', dict(embed_dim=24), r'shapes: cls_token is \(1, 1, 24\), the'),
        ('vqmoe', dict(num_experts=4), r'shapes: .*\(4, .*has \(2, '),
        ('smoe', {}, 'missing keys: .*quantizer'),
        ('stablemoe', {}, 'missing keys: .*; unexpected keys: .*router'),
        ('vqmoe', dict(class_token=False, global_pool='avg'), 'missing keys: cls_token'),
    ],
)
def test_what_does_not_fit_is_named(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        fit_state(model_of(), state_of(method, **options), 'a')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('model', 'state', 'message'),
    [
        # 3 slots cannot be dealt to two experts
        (
            ('softmoe', dict(slots_per_expert=2)),
            ('softmoe', dict(num_experts=3, slots_per_expert=1)),
            r'shapes: .*\(3, .*has \(2, ',
        ),
        # what a layer would leave out of its own method is not what another method has
        (
            ('vqmoe', dict(form='discrete')),
            ('smoe', {}),
            'missing keys: .*quantizer.*; unexpected keys: blocks.1.mlp.router.weight',
        ),
        (('patch16_224', {}), ('smoe', {}), 'missing keys: .*fc1.*; unexpected keys: .*router'),
    ],
)
def test_layers_that_do_not_fit_are_named(model: Any, state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_state(model_of(model[0], **model[1]), state_of(state[0], **state[1]), 'a')


@pytest.mark.parametrize('name', ['conv.weight', 'head.weight'])
def test_no_matching_key_is_an_error(name: str) -> None:
    model = model_of(num_classes=3)
    with pytest.raises(ValueError, match=rf"'a' has no key of the model: it has {name}; the"):
        fit_state(model, {name: torch.zeros(3, 12)}, 'a')


def test_misfit_is_empty_for_the_same_model_wrapped_for_data_parallel_training() -> None:
    state = state_of('smoe')
    assert misfit(state, prefixed('module.', state)) == ''


def test_misfit_names_keys_and_shapes() -> None:
    expected = {'a': torch.zeros(2), 'head.weight': torch.zeros(100, 4)}
    loaded = {'b': torch.zeros(1), 'head.weight': torch.zeros(10, 4)}
    assert misfit(expected, loaded) == (
        'missing keys: a; unexpected keys: b; '
        'shapes: head.weight is (10, 4), the model has (100, 4)'
    )


def test_misfit_stays_one_short_line() -> None:
    expected = {str(i): torch.zeros(1) for i in range(9)}
    assert misfit(expected, {}) == 'missing keys: 0, 1, 2 and 6 more'
