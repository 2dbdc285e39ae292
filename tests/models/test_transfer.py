import re
from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor, nn

from .. import cases, on_meta, refused
from .conftest import DINOV3, TINY, dense, fit_state, make


def model_of(method: str = 'vqmoe', **kwargs: Any) -> Any:
    """A backbone, unless it gets classes; block 1 is MoE, `method` 'patch16_224' is dense."""
    sizes = dict(embed_dim=12, depth=2, num_heads=3)
    experts = {} if 'patch16' in method else {'num_experts': 2}
    pool = {} if kwargs.get('num_classes') else {'num_classes': 0, 'global_pool': ''}
    return make(method, **{**sizes, **experts, **pool, **kwargs})


def state_of(method: str = 'vqmoe', **kwargs: Any) -> dict[str, torch.Tensor]:
    return model_of(method, **{'num_classes': 3, **kwargs}).state_dict()


def test_position_embeddings_of_an_oblong_image_are_resized():
    # 16 positions of (16, 64) pixels are no 4 x 4 grid, though there are as many
    state = state_of(img_size=(16, 64))
    grid = torch.arange(8.0).expand(2, 8)  # a ramp along the width
    state['pos_embed'][0, 1:] = grid.flatten()[:, None]
    fitted, _ = fit_state(model_of(), state, 'a', [(224, 224), (16, 64)])
    found = fitted['pos_embed'][0, 1:, 0].unflatten(0, (4, 4))
    assert (found.diff(dim=1) > 1).all()
    torch.testing.assert_close(found.diff(dim=0), torch.zeros(3, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize('before, after', [(2, 6), (6, 2)])
def test_slots_of_softmoe_are_resized(before, after):
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


def test_norm_of_averaged_features_becomes_the_final_norm():
    options = dict(class_token=False)
    state = state_of(global_pool='avg', **options)
    state['fc_norm.bias'] += 1
    fitted, notes = fit_state(model_of(**options), state, 'a')
    torch.testing.assert_close(fitted['norm.bias'], torch.ones(12))
    assert 'a: fc_norm becomes norm' in notes


def refusal(model: nn.Module, state: dict[str, Tensor]) -> str:
    return refused(r"^checkpoint 'f\.pth' ", fit_state, model, state, 'f.pth')


@cases(
    'options, source, said',
    ({}, dict(embed_dim=64, num_heads=4), r'cls_token is \(1, 1, 64\)'),
    ({}, dict(no_embed_class=True), r'pos_embed is \(1, 16,.*no_embed_class=False'),
    (dict(no_embed_class=True), {}, r'pos_embed is \(1, 17, 32\).*no_embed_class=True'),
    ({}, dict(depth=6), 'unexpected keys: blocks.4.norm1'),
    (dict(init_values=0.1), {}, 'missing keys: blocks.0.ls1.gamma'),
    ({}, dict(in_chans=1), r'proj.weight is \(32, 1, 8, 8\), the model'),
    ({}, dict(reg_tokens=3), 'unexpected keys: reg_token'),
)
def test_another_size_or_part_is_named(options, source, said):
    assert re.search(said, refusal(make('smoe', **options), dense(**source).state_dict()))


def test_a_backbone_may_end_before_its_checkpoint():
    state = dense(depth=6).state_dict()
    fitted, _ = fit_state(cast(Any, make('smoe', num_classes=0)), state, 'f.pth')
    assert 'blocks.3.norm1.weight' in fitted and 'blocks.4.norm1.weight' not in fitted


def test_a_last_norm_that_is_missing_is_a_warning():
    """As in the weights of a backbone without one."""
    model: Any = dense(global_pool='avg')
    state = {k: v for k, v in model.state_dict().items() if not k.startswith('fc_norm.')}
    _, lines = fit_state(model, state, 'f.pth')
    assert sum('has no fc_norm.weight, fc_norm.bias' in line for line in lines) == 1


def test_weights_of_a_distilled_deit_name_what_takes_them():
    with on_meta():
        names = timm.create_model('deit_tiny_distilled_patch16_224', **TINY).state_dict()
    state = {name: torch.zeros(value.shape) for name, value in names.items()}
    assert 'dist_token' in (said := refusal(make('smoe'), state)) and 'convert_to_moe' in said


@cases(
    'name',
    'beit_base_patch16_224', 'vit_relpos_small_patch16_224', 'vit_srelpos_small_patch16_224',
     'samvit_base_patch16', 'naflexvit_base_patch16_gap', 'vit_small_patch16_18x2_224',
     'vit_tiny_r_s16_p8_224',
)  # fmt: skip
def test_another_network_is_refused(name):
    with on_meta():
        names = timm.create_model(name).state_dict()
    state = {k: torch.zeros(v.shape) for k, v in names.items()}
    for host in ('vit_tiny_smoe', DINOV3):
        assert 'does not fit the model: ' in refusal(timm.create_model(host, **TINY), state)
