"""Tiny models of every method, of every preset that runs other code, and dense ones beside them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from timm.models import save_for_hf
from torch import nn

import vqmoe_vision.models  # noqa: F401  registers the models
from vqmoe_vision import collect_losses
from vqmoe_vision.models.fitting import Report, transfer
from vqmoe_vision.moe import METHODS

from ..variants import VARIANTS

# 16 patches and a class token per image; blocks 1 and 3 are MoE
TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=10)
SHALLOW: dict[str, Any] = {'depth': 1, 'moe_layers': [0]}
Make = Callable[..., nn.Module]
DENSE = 'vit_tiny_patch16_224'
DINOV3 = 'vit_small_patch16_dinov3'  # an `Eva`: rotary positions, registers, LayerScale
# of other classes: relative positions, windows, two class tokens, images of any size
BEIT, RELPOS, SAM = 'beit_base_patch16_224', 'vit_srelpos_small_patch16_224', 'samvit_base_patch16'
DISTILLED, NAFLEX = 'deit_tiny_distilled_patch16_224', 'naflexvit_base_patch16_gap'
# of other MLPs: a gate packed and apart, a norm before the second layer
GATED, NORMED = 'vit_giant_patch14_dinov2', 'eva02_base_patch14_224'
MORE = [BEIT, RELPOS, SAM, DISTILLED, NAFLEX, GATED, NORMED]
# arguments of a model by which its experts are of these kinds
WITH_GATE: dict[str, dict[str, Any]] = {
    'last': {'mlp_layer': GluMlp},
    'first': {'mlp_layer': SwiGLUPacked, 'act_layer': 'silu'},
    'separate': {'mlp_layer': SwiGLU, 'act_layer': 'silu', 'scale_mlp_norm': True},
}
# every way of every method to begin with the answers of a dense model: name, options, and an id
EXACT = [
    pytest.param(name, options, id=f'{name}-{label}')
    for name, method in METHODS.items()
    for label, options in method.config.EXACT_UPCYCLING.items()
]


def pairs(*hosts: str) -> list[tuple[str, str]]:
    """Hosts with each method that they can have: raw patches are of `VisionTransformer` alone."""
    anywhere = [name for name, method in METHODS.items() if method.read_patches is None]
    return [(h, name) for h in hosts for name in (METHODS if h == DENSE else anywhere)]


def make(method: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(f'vit_tiny_{method}', **{**TINY, **kwargs})


def shaken(model: Any) -> Any:
    """No tensor as any model starts with."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def dense(name: str = DENSE, **kwargs: Any) -> Any:
    return shaken(timm.create_model(name, **{**TINY, **kwargs}))


def folder_of(path: Path, model: Any, safe: bool = True, **options: Any) -> Path:
    """A folder of timm's with a model of these options."""
    save_for_hf(model, path / 'L', model_args={**TINY, **options}, safe_serialization=safe)
    return path / 'L'


def fit_state(model: Any, state: Any, path: str, sizes: Any = ()) -> tuple[Any, list[str]]:
    fitted, report = transfer(model, state, path, sizes)
    return fitted, [f'{path}: {line}' for line in report.lines()]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def check_complete(report: Report, model: Any, source: dict[str, torch.Tensor]) -> None:
    """Each tensor of the model has one fate, and each of the checkpoint has one."""
    fates = [*report.loaded, *report.resized, *report.copied, *report.initialised]
    assert sorted(fates) == sorted(model.state_dict())
    uses = {*report.loaded, *report.resized, *report.copied.values()}
    assert sorted([*uses, *report.unused, *report.outside]) == sorted(source)


@pytest.fixture(params=METHODS)
def method(request) -> str:
    return request.param


@pytest.fixture
def tiny(method) -> Make:
    """Builds a tiny model of each method in turn."""
    return lambda **kwargs: make(method, **kwargs)


@pytest.fixture(params=VARIANTS)
def tiny_variant(request) -> Make:
    """Builds a tiny model of each method, preset and form in turn."""
    method, options = VARIANTS[request.param]
    return lambda **kwargs: make(method, **{**options, **kwargs})


@pytest.fixture
def saved(tmp_path) -> tuple[Any, str]:
    """A dense model, and its file."""
    model, path = dense(), tmp_path / 'dense.pth'
    torch.save(model.state_dict(), path)
    return model, str(path)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32)


@pytest.fixture
def train_step() -> Callable[..., torch.Tensor]:
    """One step of the loop that users are told to write; returns the loss."""

    def step(model, optimizer, images, targets) -> torch.Tensor:
        model.train()
        model.zero_grad()
        with collect_losses(model) as collected:
            loss = nn.functional.cross_entropy(model(images), targets) + collected.total()
            loss.backward()
        if optimizer is not None:
            optimizer.step()
        return loss.detach()

    return step
