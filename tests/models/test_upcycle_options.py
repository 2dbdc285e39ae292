"""Noise, dropped units and splits: what they do to the experts, and where they have no effect."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from vqmoe_vision.models.create import create_model
from vqmoe_vision.models.upcycle import Upcycling, upcycle
from vqmoe_vision.moe.experts import Experts

from .conftest import DENSE, TINY, make, shaken


def test_options_of_upcycling_need_dense_weights(tmp_path: Path) -> None:
    path, how = str(tmp_path / 'a.pth'), {'upcycling': {'noise': 0.1}}
    torch.save(make('smoe').state_dict(), path)
    builds: list[Any] = [
        lambda **how: make('smoe', **how),
        lambda **how: create_model(DENSE, {'method': 'smoe'}, **TINY, **how),
        lambda **how: create_model('vit_tiny_smoe', checkpoint_path=path, **TINY, **how),
    ]
    for build in (*builds, lambda **how: make('smoe', upcycle=path, **how)):
        with pytest.raises(ValueError, match=r'upcycling=.*noise=0\.1.* no dense'):
            build(**how)
    for build in builds:
        build(upcycling={'noise': 0.0, 'split': False})


def mlp_of(width: int = 8, hidden: int = 32) -> Any:
    return shaken(timm.layers.Mlp(width, hidden))


def made(mlp: Any, hidden: int, number: int = 4, **options: Any) -> dict[str, torch.Tensor]:
    experts = Experts(number, mlp.fc1.in_features, hidden)
    return upcycle(mlp.state_dict(), experts, Upcycling(**options), 'mlp')


def test_noise_is_relative_to_the_weights() -> None:
    mlp = mlp_of(32, 128)
    weights = made(mlp, 128, noise=0.1)
    for layer in ('fc1', 'fc2'):
        original = getattr(mlp, layer).weight
        change = weights[f'{layer}.weight'] - original
        assert (change.std() / original.std()).item() == pytest.approx(0.1, rel=0.05)
        assert not torch.equal(change[0], change[1])
        assert torch.equal(weights[f'{layer}.bias'][0], getattr(mlp, layer).bias)


# 4 / 3 of a width, and 4,304 of 1,152 as a SigLIP has: six digits of either make one unit fewer
@pytest.mark.parametrize(('width', 'hidden'), [(12, 16), (192, 256), (1152, 4304), (832, 960)])
def test_the_ratio_that_is_told_fits(width: int, hidden: int) -> None:
    with pytest.raises(ValueError, match='expert_mlp_ratio=') as caught:
        upcycle(mlp_of(width, hidden).state_dict(), Experts(1, width, 8), Upcycling(), 'an MLP')
    told = re.search(r'expert_mlp_ratio=([0-9.]+) fits', str(caught.value))
    assert told is not None
    assert int(width * float(told[1])) == hidden


def test_dropped_units_are_drawn_like_those_they_replace() -> None:
    mlp = mlp_of(64, 256)
    with torch.no_grad():
        mlp.fc2.weight.add_(3)
    weights = made(mlp, 256, drop=0.25)
    for expert in range(4):
        same = (weights['fc1.weight'][expert] == mlp.fc1.weight).all(dim=1)
        assert same.sum() == 192  # three quarters of 256
        # a unit is dropped whole: its row, its bias and its column
        assert torch.equal(same, weights['fc1.bias'][expert] == mlp.fc1.bias)
        columns = (weights['fc2.weight'][expert] == mlp.fc2.weight).all(dim=0)
        assert torch.equal(same, columns)
        drawn = weights['fc2.weight'][expert][:, ~same]
        assert drawn.mean().item() == pytest.approx(3, abs=0.05)
        expected = mlp.fc2.weight[:, ~same].std().item()
        assert drawn.std().item() == pytest.approx(expected, rel=0.1)
    assert not torch.equal(weights['fc1.weight'][0], weights['fc1.weight'][1])


def test_experts_that_split_an_mlp_answer_as_it_does_together() -> None:
    mlp = mlp_of()
    with torch.no_grad():
        mlp.fc2.bias.zero_()
    # 4 experts of 16 units take each of the 32 twice; F / H = 2, so that their mean is the MLP
    weights = made(mlp, 16, split=True)
    x = torch.randn(5, 8)
    hidden = torch.einsum('td,ehd->eth', x, weights['fc1.weight']) + weights['fc1.bias'][:, None]
    answers = torch.einsum('eth,edh->etd', mlp.act(hidden), weights['fc2.weight'])
    torch.testing.assert_close(answers.mean(dim=0), mlp(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(weights['fc1.weight'][0], weights['fc1.weight'][2])  # shuffled anew


def test_experts_that_cannot_have_all_units_are_refused(saved: tuple[Any, str]) -> None:
    options: dict[str, Any] = dict(expert_mlp_ratio=1.0, upcycling={'split': True})
    make('smoe', upcycle=saved[1], num_experts=4, **options)  # of 32 units each
    with pytest.raises(ValueError, match=r'upcycling\.split=True .* 2 experts of 32 .* 128 units'):
        make('smoe', upcycle=saved[1], num_experts=2, **options)
