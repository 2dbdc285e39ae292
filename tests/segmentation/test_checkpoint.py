from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.logging import HistoryBuffer
from mmseg.registry import MODELS
from safetensors.torch import save_file

from vqmoe_vision.segmentation.checkpoint import fit_state, read_state

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
        ('vit_tiny_smoe', {}, 'another MoE method: it has nothing instead of .*quantizer'),
        ('vit_tiny_stablemoe', {}, 'another MoE method: it has .*router.* instead of'),
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
