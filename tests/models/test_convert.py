"""A model that is already there gets experts where its MLPs are, or stays as it is."""

import pickle
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked

from vqmoe_vision import collect_losses
from vqmoe_vision.models import MoeVisionTransformer, convert_to_moe
from vqmoe_vision.moe import METHODS

from .conftest import EXACT, check_complete, dense, make


@pytest.mark.parametrize(('method', 'options'), EXACT)
def test_a_converted_model_is_one_of_ours(
    method: str, options: dict[str, Any], images: torch.Tensor
) -> None:
    model = dense()
    source = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(images)
    report = convert_to_moe(model, method, **options)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    check_complete(report, model, source)
    assert isinstance(model, MoeVisionTransformer)
    ours: Any = make(method, **options)
    assert ours.no_weight_decay() == model.no_weight_decay()
    ours.load_state_dict(model.state_dict())
    torch.testing.assert_close(ours.eval()(images), model(images))


@pytest.mark.parametrize('training', [False, True])
def test_what_is_put_in_is_in_the_mode_of_the_model(method: str, training: bool) -> None:
    model, ours = dense().train(training), make(method).train(training)
    convert_to_moe(model, method)
    expected = {name: module.training for name, module in ours.named_modules()}
    assert {name: module.training for name, module in model.named_modules()} == expected


def test_a_converted_model_trains_as_ours_under_checkpointing(
    method: str, images: torch.Tensor, train_step: Any
) -> None:
    converted, targets = dense(), torch.arange(4)
    converted.set_grad_checkpointing()
    convert_to_moe(converted, method)
    ours: Any = make(method)
    ours.load_state_dict(converted.state_dict())
    calls: list[Any] = []
    converted.blocks[1].norm1.register_forward_hook(lambda *args: calls.append(args))
    for model in (converted, ours):
        torch.manual_seed(0)  # of the router noise
        train_step(model, None, images, targets)
    assert len(calls) == 2  # in the forward pass, and again in the backward pass
    for name, parameter in converted.named_parameters():
        expected = ours.get_parameter(name).grad
        assert (parameter.grad is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def dinov3(name: str = 'vit_small_patch16_dinov3', **kwargs: Any) -> Any:
    """An `Eva`: rotary positions, registers, LayerScale."""
    return dense(name, **kwargs)


@pytest.mark.parametrize(('method', 'options'), EXACT)
def test_a_model_of_dinov3_is_converted(
    method: str, options: dict[str, Any], images: torch.Tensor
) -> None:
    if METHODS[method].read_patches is not None:
        refused = f"block='EvaBlock' is not possible: .*{method} looks"
        with pytest.raises(ValueError, match=refused):
            convert_to_moe(dinov3(), method, **options)
        return
    model = dinov3()
    source = {name: value.clone() for name, value in model.state_dict().items()}
    undecayed = model.no_weight_decay()
    expected = model(images)
    report = convert_to_moe(model, method, **options)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    check_complete(report, model, source)
    biases = {n for n in model.state_dict() if n.endswith(('experts.fc1.bias', 'experts.fc2.bias'))}
    assert undecayed | biases <= model.no_weight_decay() <= {*model.state_dict(), *undecayed}
    assert f'{method}: ' in str(model)
    model.train()
    with collect_losses(model) as collected:
        (model(images).sum() + collected.total()).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if 'experts' in n)
    again = pickle.loads(pickle.dumps(model.eval()))
    assert torch.equal(again(images), model(images))


class Doubled(torch.nn.Linear):
    """The tensors of a linear layer, and another answer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def with_layer(part: str) -> Any:
    model = dense()
    getattr(model.blocks[1].mlp, part).__class__ = Doubled
    return model


def undrawn(name: str) -> Any:
    with torch.device('meta'):
        return timm.create_model(name)


@pytest.mark.parametrize(
    ('build', 'options', 'message'),
    [
        (
            lambda: dinov3('eva02_tiny_patch14_224'),
            {},
            r"blocks.1.mlp='GluMlp' is not .* gated MLPs \(SwiGLU\)",
        ),
        (
            lambda: dense(mlp_layer=SwiGLUPacked),
            {},
            "blocks.1.mlp='GluMlp' is not possible: timm's",
        ),
        *(
            (partial(undrawn, name), {}, "patch_embed.proj='Identity' is not possible: a convol")
            for name in ('vitamin_small_224', 'vit_base_mci_224')
        ),
        (lambda: dense(scale_mlp_norm=True), {}, 'without a norm between its layers'),
        *(
            (partial(with_layer, part), {}, f"blocks.1.mlp.{part}='Doubled' is not possible: torch")
            for part in ('fc1', 'fc2')
        ),
        (lambda: make('smoe'), {}, "model='MoeVisionTransformer' is not possible"),
        (
            lambda: torch.nn.Linear(2, 2),
            {},
            "model='Linear' is not possible: timm's VisionTransformer or Eva",
        ),
        (dense, dict(moe_layers=[7]), r'moe_layers=\[7\] is not possible'),
        (dense, dict(top_k=9), 'top_k=9 is not possible'),
        (dense, dict(expert_mlp_ratio=2.0), 'upcycling.split=True cuts it'),
    ],
)
def test_what_cannot_be_converted_stays_as_it_is(
    build: Any, options: dict[str, Any], message: str
) -> None:
    model = build()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        convert_to_moe(model, 'smoe', **options)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(
    'build', [dense, partial(dinov3, 'vit_small_patch16_dinov3')], ids=['vit', 'eva']
)
def test_patches_are_dropped_where_a_method_does_not_need_their_places(
    method: str, build: Any, images: torch.Tensor
) -> None:
    entry = METHODS[method]
    anywhere = make(method).blocks[1].mlp.permutation_equivariant
    if entry.read_patches is not None and build is not dense:
        pytest.skip('no Eva has it')

    def converted() -> Any:
        model = build(patch_drop_rate=0.5)
        convert_to_moe(model, method)
        return model

    for built in (partial(make, method, patch_drop_rate=0.5), converted):
        if anywhere:
            model = built()
            with collect_losses(model.train()):
                assert model(images).isfinite().all()
            continue
        with pytest.raises(ValueError, match=r'patch_drop_rate=0\.5 is not possible: 0, '):
            built()


def test_an_option_that_a_method_has_not_is_named() -> None:
    with pytest.raises(TypeError, match="'slots_per_expert' is no option of smoe"):
        convert_to_moe(dense(), 'smoe', slots_per_expert=2)


def test_an_mlp_may_have_what_timm_does_not_build(images: torch.Tensor) -> None:
    model = dense(act_layer='prelu')
    for block in model.blocks:
        block.mlp.drop1 = block.mlp.drop2 = torch.nn.Identity()
    expected = model(images)
    convert_to_moe(model, 'smoe', renormalize=True)
    torch.testing.assert_close(model(images), expected)
    other = dense()
    for block in other.blocks:
        block.mlp.drop1, block.mlp.act = torch.nn.Dropout(0.5), torch.nn.PReLU(17)
    with pytest.raises(ValueError, match=r'mlp drop=\(0\.5, 0\.0\) is not possible: the same in'):
        convert_to_moe(other, 'smoe')
    for block in other.blocks:
        block.mlp.drop1 = torch.nn.Dropout(0.0)
    with pytest.raises(ValueError, match=r'blocks\.1\.mlp cannot become experts: its act\.weight'):
        convert_to_moe(other, 'smoe')
    for block in other.blocks:
        block.mlp.drop2 = torch.nn.AlphaDropout(0.1)
    with pytest.raises(ValueError, match="drop2='AlphaDropout' is not possible: Dropout or Ident"):
        convert_to_moe(other, 'smoe')
    assert type(other).__name__ == 'VisionTransformer'
