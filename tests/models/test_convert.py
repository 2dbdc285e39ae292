"""A model that is already there gets experts where its MLPs are, or stays as it is."""

import pickle
from functools import partial
from typing import Any

import pytest
import torch

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
        with pytest.raises(ValueError, match=f"block_fn='EvaBlock' .* {method} looks at"):
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
