"""Refusals of weights say in what they differ, and what is said to fit does."""

import re
from itertools import permutations
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor, nn

from vqmoe_vision.models.create import create_model
from vqmoe_vision.models.quantization import experts_as_linear
from vqmoe_vision.models.transfer import fit_state, transfer
from vqmoe_vision.models.upcycle import Upcycling
from vqmoe_vision.moe import METHODS

from ..variants import VARIANTS
from .conftest import TINY, Make, make

CLUSTERS = next(name for name, method in METHODS.items() if method.needs_features)


def dense(name: str = 'vit_tiny_patch16_224', **kwargs: Any) -> nn.Module:
    return timm.create_model(name, **{**TINY, **kwargs})


def refusal(model: nn.Module, state: dict[str, Tensor]) -> str:
    with pytest.raises(ValueError, match=r"^checkpoint 'f\.pth' ") as caught:
        fit_state(model, state, 'f.pth')
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ('options', 'source', 'said', 'fits'),
    [
        ({}, make('smoe', num_experts=4), 'another size: blocks', dict(num_experts=4)),
        ({}, dense(no_embed_class=True), 'pos_embed is (1, 16,', dict(no_embed_class=True)),
        (
            dict(no_embed_class=True),
            dense(),
            'pos_embed is (1, 17, 32)',
            dict(no_embed_class=False),
        ),
        ({}, dense(depth=6), 'only the checkpoint has blocks.4.norm1', dict(depth=6)),
        (
            dict(init_values=0.1),
            dense(),
            'only the model has blocks.0.ls1.gamma',
            dict(init_values=0.0),
        ),
        (
            dict(pre_norm=True),
            dense(),
            'only the checkpoint has patch_embed.proj.bias',
            dict(pre_norm=False),
        ),
        ({}, dense(in_chans=1), 'proj.weight is (32, 1, 8, 8), the model', dict(in_chans=1)),
    ],
)
def test_what_is_said_to_fit_does(
    options: dict[str, Any], source: nn.Module, said: str, fits: dict[str, Any]
) -> None:
    line = refusal(make('smoe', **options), source.state_dict())
    assert said in line
    ((name, value),) = fits.items()
    assert line.endswith(f' {name}={value} would fit')
    fit_state(make('smoe', **{**options, **fits}), source.state_dict(), 'f.pth')


@pytest.mark.parametrize(
    'source',
    [
        dense(embed_dim=64, num_heads=4),
        make('smoe', embed_dim=48, num_heads=3),
        dense(embed_dim=64, num_heads=4, depth=6),
        dense(embed_dim=64, num_heads=4, depth=3),
    ],
)
def test_another_width_has_its_heads_and_its_depth(source: Any) -> None:
    state, width, depth = source.state_dict(), source.embed_dim, len(source.blocks)
    line = refusal(make('smoe'), state)
    also = '' if depth == TINY['depth'] else f', depth={depth}'
    heads = source.blocks[0].attn.num_heads
    said = f'embed_dim={width}{also} and the num_heads of the checkpoint, probably {heads}, would'
    assert 'another size: cls_token' in line and line.endswith(f'; {said} fit')
    fit_state(make('smoe', embed_dim=width, depth=depth, num_heads=heads), state, 'f.pth')


def test_a_backbone_may_end_before_a_wider_checkpoint() -> None:
    state = dense(embed_dim=64, num_heads=4, depth=6).state_dict()
    line = refusal(make('smoe', num_classes=0), state)
    assert '; embed_dim=64 and the num_heads of the checkpoint, probably 4, would fit' in line


def test_another_number_of_experts_has_its_option(tiny: Make) -> None:
    state = tiny(num_experts=4).state_dict()
    line = refusal(tiny(num_experts=3), state)
    assert line.endswith('; num_experts=4 would fit')
    fit_state(tiny(num_experts=4), state, 'f.pth')


def test_clusters_are_no_experts() -> None:
    state = make(CLUSTERS, num_clusters=8, num_experts=8).state_dict()
    line = refusal(make(CLUSTERS, num_clusters=4, num_experts=8), state)
    assert line.endswith('; num_clusters=8 would fit')
    line = refusal(make(CLUSTERS, num_clusters=4, num_experts=4), state)
    assert 'another size' in line and line.endswith('; num_experts=8, num_clusters=8 would fit')


@pytest.mark.parametrize(
    ('name', 'shape'),
    [
        ('blocks.0.mlp.fc1.weight', (4096,)),
        ('blocks.1.mlp.experts.fc1.weight', (4096,)),
        ('blocks.1.mlp.experts.fc1.bias', ()),
        ('blocks.1.mlp.router.weight', ()),
        ('blocks.1.mlp.router.cluster_embed', ()),
        ('patch_embed.proj.bias', ()),
    ],
)
def test_another_number_of_dimensions_has_no_option(name: str, shape: tuple[int, ...]) -> None:
    model = make(CLUSTERS)
    line = refusal(model, {**model.state_dict(), name: torch.zeros(shape)})
    assert f'another size: {name} is' in line and 'would fit' not in line


def test_another_number_of_clusters_has_its_option() -> None:
    state = make(CLUSTERS, num_clusters=5).state_dict()
    line = refusal(make(CLUSTERS, num_clusters=3), state)
    assert line.endswith('the model has (3, 32); num_clusters=5 would fit')
    fit_state(make(CLUSTERS, num_clusters=5), state, 'f.pth')


def test_another_mlp_ratio_has_its_option() -> None:
    # timm rounds 32 * 3.7 = 118.4 down; 118 / 32 = 3.6875
    state = dense(mlp_ratio=3.7).state_dict()
    line = refusal(make('smoe'), state)
    assert line.endswith('; mlp_ratio=3.6875 would fit')
    fit_state(make('smoe', mlp_ratio=3.6875), state, 'f.pth')


def test_a_discrete_form_is_not_of_another_method() -> None:
    state = make('vqmoe', form='discrete').state_dict()
    line = refusal(make('vqmoe'), state)
    assert 'has experts with other options: only the model has blocks' in line
    assert line.endswith("; form='discrete' would fit")


FORMS = ('full', 'discrete', 'continuous')


@pytest.mark.parametrize(('theirs', 'ours'), list(permutations(FORMS, 2)))
def test_another_form_is_not_said_to_be_of_another_method_for_certain(
    theirs: str, ours: str
) -> None:
    state = make('vqmoe', form=theirs).state_dict()
    if (theirs, ours) == ('full', 'discrete'):  # takes what it has
        fit_state(make('vqmoe', form=ours), state, 'f.pth')
        return
    line = refusal(make('vqmoe', form=ours), state)
    shared = theirs == 'continuous'  # whose tensors other methods have too
    assert ('is of another MoE method, or has other options: ' in line) == shared
    assert f'; form={theirs!r}{", or a model of smoe, or of " if shared else " would fit"}' in line
    fit_state(make('vqmoe', form=theirs), state, 'f.pth')


def test_a_dense_model_has_no_method_that_is_another(method: str) -> None:
    line = refusal(dense(), make(method).state_dict())
    assert 'has experts and the model has none: only it has blocks.1.mlp' in line
    assert line.endswith('; a model with such experts would fit')


def test_weights_of_eight_bits_become_experts() -> None:
    state = {k: v.to(torch.float8_e4m3fn) for k, v in dense().state_dict().items()}
    found, report = transfer(cast(Any, make('smoe')), state, 'f.pth', upcycling=Upcycling())
    assert report.copied
    expected = state['blocks.1.mlp.fc1.weight'].float().expand(4, -1, -1)
    assert torch.equal(found['blocks.1.mlp.experts.fc1.weight'][:4], expected)


def test_arrays_are_no_tensors(tmp_path: Path) -> None:
    state: Any = {name: value.numpy() for name, value in dense().state_dict().items()}
    said = 'cls_token is a numpy.ndarray, and weights are tensors; torch.from_numpy makes one of an'
    assert said in refusal(make('smoe'), state)
    torch.save(state, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=said):
        create_model('vit_tiny_patch16_224', checkpoint_path=str(tmp_path / 'a.pth'), **TINY)


def test_of_another_method_no_number_of_experts_fits() -> None:
    line = refusal(make('xmoe', num_experts=3), make('smoe', num_experts=2).state_dict())
    assert 'is of another MoE method: ' in line and '; num_experts=2' not in line
    assert '; a model of smoe with num_experts=2, or of ' in line and line.endswith(' would fit')


def test_a_checkpoint_tells_its_method(method: str) -> None:
    """Unless it fits, as experts of methods whose tensors are the same."""
    state = make(method).state_dict()
    refused = 0
    for other in METHODS:
        try:
            fit_state(cast(Any, make(other)), state, 'f.pth')
        except ValueError as error:
            refused += 1
            assert 'is of another MoE method' in str(error)
            assert re.search(rf'; .*\bof {method}\b[^;]* would fit$', str(error))
    assert refused >= len(METHODS) - 3


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_checkpoint_tells_its_options(variant: str) -> None:
    method, options = VARIANTS[variant]
    state = make(method, **options).state_dict()
    try:
        fit_state(cast(Any, make(method)), state, 'f.pth')
    except ValueError as error:
        said = re.search(r"; ((\w+=[\w.']+(, )?)+)( or .*|, or .*)? would fit$", str(error))
        assert said is not None
        fit_state(cast(Any, make(method, **eval(f'dict({said[1]})'))), state, 'f.pth')
    else:  # slots are fitted, and another form is left out
        assert make(method).state_dict().keys() <= state.keys()


def test_a_bias_of_a_layer_that_is_missing_is_no_option() -> None:
    line = refusal(make('smoe'), dense('vit_small_patch16_18x2_224').state_dict())
    assert 'only the checkpoint has blocks.0.attns' in line and 'would fit' not in line


@pytest.mark.parametrize(
    ('source', 'said'),
    [
        (dict(embed_dim=66), 'embed_dim=66 and the num_heads of the checkpoint'),
        (
            dict(embed_dim=64, mlp_ratio=2),
            'embed_dim=64, mlp_ratio=2.0 and the num_heads of the checkpoint, probably 8,',
        ),
        (  # positions are resized
            dict(embed_dim=64, img_size=64),
            'embed_dim=64 and the num_heads of the checkpoint, probably 8,',
        ),
    ],
)
def test_a_width_that_is_not_all_is_said_with_the_rest(source: dict[str, Any], said: str) -> None:
    line = refusal(make('smoe', num_heads=4), dense(**{'num_heads': 2, **source}).state_dict())
    assert line.endswith(f'; {said} would fit')


def test_experts_in_other_blocks_are_no_other_method(tiny: Make) -> None:
    state = tiny(moe_layers=[0, 2]).state_dict()
    line = refusal(tiny(moe_layers=[1, 2]), state)
    said = 'has its experts in blocks 0, 2, the model in blocks 1, 2; moe_layers=[0, 2] would fit'
    assert line == f"checkpoint 'f.pth' {said}"
    fit_state(tiny(moe_layers=[0, 2]), state, 'f.pth')


def test_experts_of_another_method_in_other_blocks_are_not_said_to_fit() -> None:
    state = make('vqmoe', moe_layers=[0]).state_dict()
    said = 'another MoE method: only it has'
    assert said in refusal(make('smoe', moe_layers=[1]), state)
    state = make('smoe', moe_layers=[0], num_experts=3).state_dict()
    line = refusal(make('smoe', moe_layers=[1]), state)
    assert line.endswith('has its experts in blocks 0, the model in blocks 1')


def test_experts_as_linear_layers_are_no_other_method(method: str) -> None:
    separate = experts_as_linear(make(method))
    line = refusal(make(method), separate.state_dict())
    assert 'as experts_as_linear leaves them: call experts_as_linear(model) before' in line
    fit_state(experts_as_linear(make(method)), separate.state_dict(), 'f.pth')
    line = refusal(separate, make(method).state_dict())
    assert line.endswith('holds experts stacked: load its weights before experts_as_linear(model)')


def test_linear_experts_of_another_method_are_those_of_another_method() -> None:
    state = experts_as_linear(make('vqmoe')).state_dict()
    line = refusal(make('smoe'), state)
    assert 'is of another MoE method: only it has' in line
    assert line.endswith('; a model of vqmoe would fit')


@pytest.mark.parametrize('num_classes', [0, 10])
@pytest.mark.parametrize('pooling', ['token', 'avg'])
@pytest.mark.parametrize(
    ('host', 'options', 'fits'),
    [
        ('vit_tiny_patch16_224', {}, {'final_norm': False}),
        (
            'eva02_tiny_patch14_224',
            {'swiglu_mlp': False},
            {'use_post_transformer_norm': False, 'use_fc_norm': False},
        ),
    ],
)
def test_a_last_norm_that_is_missing_is_a_warning(
    host: str, options: dict[str, Any], fits: dict[str, Any], pooling: str, num_classes: int
) -> None:
    """As in the weights of a backbone without one."""
    options = {**options, 'global_pool': pooling, 'num_classes': num_classes}
    model: Any = dense(host, **options)
    state = model.state_dict()
    norms = [name for name in state if name.startswith(('norm.', 'fc_norm.'))]
    state = {name: value for name, value in state.items() if name not in norms}
    _, report = transfer(model, state, 'f.pth')
    option = ', '.join(f'{name}={value}' for name, value in fits.items())
    said = (
        f'the checkpoint has no {", ".join(norms)}, so that the last norm is as initialised: '
        f'{option} would fit'
    )
    assert len(norms) == 2 and said in report.warnings and said in report.lines()
    _, report = transfer(dense(host, **options, **fits), state, 'f.pth')
    assert not any('norm' in line for line in report.lines())


@pytest.mark.parametrize(
    ('ours', 'theirs', 'fits'), [('rmsnorm', None, 'layernorm'), (None, 'rmsnorm', 'rmsnorm')]
)
def test_norms_that_lack_a_part_are_no_other_depth(
    ours: str | None, theirs: str | None, fits: str
) -> None:
    state = dense(norm_layer=theirs).state_dict()
    line = refusal(make('smoe', norm_layer=ours), state)
    assert 'blocks.0.norm1.bias' in line and line.endswith(f'; norm_layer={fits!r} would fit')
    fit_state(make('smoe', norm_layer=fits), state, 'f.pth')


def test_a_distilled_model_is_known_by_its_token() -> None:
    state = dense('deit_tiny_distilled_patch16_224').state_dict()
    assert refusal(make('smoe'), state).endswith(
        'only the checkpoint has dist_token; a distilled DeiT, deit_*_distilled_*, would fit, '
        'which is dense and takes no experts'
    )
    assert refusal(dense('deit_tiny_distilled_patch16_224'), dense().state_dict()).endswith(
        'only the model has dist_token'
    )
    fit_state(dense('deit_tiny_distilled_patch16_224'), state, 'f.pth')
