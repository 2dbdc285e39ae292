"""The full form of VQMoE in, its discrete form out."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from vqmoe_vision import collect_losses
from vqmoe_vision.models import to_discrete
from vqmoe_vision.models.compat import misfit_of
from vqmoe_vision.models.create import create_model

from .conftest import TINY, make

FULL = [{}, {'preset': 'official'}, {'codebook': 'simvq', 'num_codes': 16, 'output_norm': True}]


def full(**options: Any) -> Any:
    """A full model no tensor of which is as it started."""
    model: Any = make('vqmoe', **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def gated_to_the_codes(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Answers of the full model with g(x)_d = 1: softmax of (0, 1000) is (0, 1) in float32."""
    for block in model.blocks[1::2]:
        gate = block.mlp.gate
        torch.nn.init.zeros_(gate.weight)
        gate.bias.data = gate.bias.new_tensor([0.0, 1000.0])
    return model(images)


@pytest.mark.parametrize('options', FULL)
def test_answers_are_those_of_the_gate_fixed_to_the_codes(
    options: dict[str, Any], images: torch.Tensor
) -> None:
    # float64: products of other numbers of rows round differently, here in the sixteenth digit
    model, images = full(**options).double(), images.double()
    expected = gated_to_the_codes(model, images)
    before = model.state_dict()
    assert to_discrete(model) is model
    torch.testing.assert_close(model(images), expected, rtol=1e-11, atol=1e-11)
    gone = before.keys() - model.state_dict().keys()
    assert gone == {n for n in before if '.mlp.router.' in n or '.mlp.gate.' in n}


@pytest.mark.parametrize('options', FULL)
def test_a_full_file_goes_into_the_discrete_form_by_every_loading(
    options: dict[str, Any], images: torch.Tensor, tmp_path: Path
) -> None:
    source, path = full(**options), str(tmp_path / 'full.pth')
    state = source.state_dict()
    torch.save(state, path)
    unused = ('balance_weight', 'train_router')
    form = {k: v for k, v in options.items() if k not in unused} | {'form': 'discrete'}
    strict: Any = make('vqmoe', **form)
    assert misfit_of(strict, {f'module.{name}': value for name, value in state.items()}) == ''
    strict.load_state_dict(state)
    overlay = {'file': path}
    assert set(state) == set(source.state_dict())  # the caller's is as it was
    expected = to_discrete(source)(images)
    for model in (
        strict,
        make('vqmoe', **form, checkpoint_path=path),
        make('vqmoe', **form, pretrained=True, pretrained_cfg_overlay=overlay),
    ):
        assert torch.equal(model.eval()(images), expected)


@pytest.mark.parametrize('said', [{}, {'form': 'full'}])
def test_a_discrete_model_learns_and_is_built_again(
    said: dict[str, str], tmp_path: Path, images: torch.Tensor
) -> None:
    model = to_discrete(full(balance_weight=0.1, num_experts=4, **said))
    model.train()
    with collect_losses(model) as collected:
        (model(images).sum() + collected.total()).backward()
    assert all(name.endswith('/vq') for name in collected.losses)
    assert all(p.grad is not None for name, p in model.named_parameters() if 'experts' in name)
    discrete: Any = model.eval()
    assert discrete.moe_config.form == 'discrete'
    save_for_hf(discrete, tmp_path / 'saved')
    again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    assert torch.equal(again(images), discrete(images))


@pytest.mark.parametrize('host', [None, 'vit_tiny_patch16_224'])
def test_the_discrete_form_of_a_saved_full_model(
    host: str | None, tmp_path: Path, images: torch.Tensor
) -> None:
    options = {'balance_weight': 0.1, 'num_experts': 4}
    moe = {'method': 'vqmoe', **options} if host else options
    model: Any = create_model(host or 'vit_tiny_vqmoe', moe, **TINY)
    save_for_hf(model, tmp_path / 'full')
    folder = f'local-dir:{tmp_path / "full"}'
    discrete: Any = timm.create_model(folder, pretrained=True, form='discrete').eval()
    assert torch.equal(discrete(images), to_discrete(model).eval()(images))
    with pytest.raises(ValueError, match=r"balance_weight=0\.3 .* no effect with form='discrete'"):
        timm.create_model(folder, pretrained=True, form='discrete', balance_weight=0.3)
    assert 'balance_weight' not in discrete._model_args
    save_for_hf(discrete, tmp_path / 'discrete')  # and it is saved again
    again = timm.create_model(f'local-dir:{tmp_path / "discrete"}', pretrained=True).eval()
    assert torch.equal(again(images), discrete(images))
