"""What is known of how images were normalised for weights."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf

from vqmoe_vision.engine import normalization
from vqmoe_vision.engine.normalization import must_change, read_normalization, weights_normalization
from vqmoe_vision.models.create import create_model
from vqmoe_vision.models.normalization import Normalization

SMALL: dict[str, Any] = dict(img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3)
DEIT, AUGREG = 'deit_tiny_patch16_224', 'vit_tiny_patch16_224'
IMAGENET = Normalization(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
GREY = Normalization((0.5,) * 3, (0.5,) * 3)
SEGMENTATION = 'model = dict(data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3))'


def dense(folder: Path, name: str = DEIT) -> None:
    """Weights of a model as a file without more, and as timm's folder."""
    model = timm.create_model(name, **SMALL)
    torch.save(model.state_dict(), folder / 'bare.pth')
    save_for_hf(model, folder / 'hub', safe_serialization=True)


def run_file(folder: Path, **state: torch.Tensor) -> str:
    """What a run leaves, or one of mmseg."""
    torch.save({'state_dict': state, 'meta': {'cfg': SEGMENTATION}}, folder / 'run.pth')
    return str(folder / 'run.pth')


@pytest.mark.parametrize(
    ('name', 'arguments', 'expected'),
    [
        ('vit_tiny_smoe', {}, None),
        (AUGREG, {}, None),  # its configuration is there, weights are not
        ('vit_tiny_smoe', {'upcycle': 'local-dir:{}/hub'}, IMAGENET),
        ('vit_tiny_smoe', {'upcycle': '{}/bare.pth'}, None),
        ('vit_tiny_smoe', {'upcycle': '{}/hub/model.safetensors'}, IMAGENET),
        ('vit_tiny_smoe', {'pretrained': True, 'file': '{}/hub/model.safetensors'}, IMAGENET),
        ('vit_tiny_smoe', {'pretrained': True, 'file': '{}/bare.pth'}, None),
        (AUGREG, {'checkpoint_path': '{}/hub/model.safetensors'}, IMAGENET),
        (AUGREG, {'checkpoint_path': '{}/bare.pth'}, None),
        ('vit_tiny_smoe', {'pretrained': True, 'file': '{}/bare.pth', **vars(GREY)}, GREY),
        # timm's own name for the weights, wherever they lie
        (DEIT, {'pretrained': True, 'file': '{}/bare.pth'}, IMAGENET),
        (AUGREG, {'pretrained': True, 'file': '{}/bare.pth'}, GREY),
    ],
)
def test_weights_that_timm_loads(
    name: str, arguments: dict[str, Any], expected: Normalization | None, tmp_path: Path
) -> None:
    dense(tmp_path)
    placed = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in arguments.items()}
    overlay = {k: placed.pop(k) for k in ('file', 'mean', 'std') if k in placed}
    if overlay:
        placed['pretrained_cfg_overlay'] = overlay
    model = create_model(name, **{**SMALL, 'num_classes': 1000}, **placed)
    assert weights_normalization(model, None, placed) == expected


@pytest.mark.parametrize('name', ['vit_tiny_smoe', AUGREG])
@pytest.mark.parametrize(
    ('file', 'said', 'expected'),
    [
        ('bare.pth', {}, None),
        ('bare.pth', vars(GREY), GREY),
        ('hub/model.safetensors', {}, IMAGENET),
        ('hub/model.safetensors', vars(GREY), GREY),
    ],
)
def test_a_configuration_of_the_call_says_what_it_says(
    name: str, file: str, said: dict[str, Any], expected: Normalization | None, tmp_path: Path
) -> None:
    dense(tmp_path)
    config = {'file': str(tmp_path / file), **said}
    placed: dict[str, Any] = {'pretrained': True, 'pretrained_cfg': config}
    model = create_model(name, **{**SMALL, 'num_classes': 1000}, **placed)
    assert weights_normalization(model, None, placed) == expected


@pytest.mark.parametrize('name', ['vit_tiny_smoe', AUGREG])
@pytest.mark.parametrize(('stated', 'missing'), [('mean', 'std'), ('std', 'mean')])
def test_half_of_a_pair_is_refused_wherever_it_stands(
    name: str, stated: str, missing: str, tmp_path: Path
) -> None:
    dense(tmp_path)
    half = {stated: [0.5] * 3}
    allowed = f'is not possible: beside .*{missing}, mean and std or neither of them'
    placed = {'pretrained': True, 'pretrained_cfg': {'file': str(tmp_path / 'bare.pth'), **half}}
    with pytest.raises(ValueError, match=rf'pretrained_cfg\.{stated}=\[0\.5.* {allowed}'):
        create_model(name, **SMALL, **placed)
    with pytest.raises(ValueError, match=rf'pretrained_cfg\.{stated}=\[0\.5.* {allowed}'):
        create_model(name, **SMALL, pretrained_cfg=half)  # nor where it says nothing of weights
    with pytest.raises(
        ValueError, match=r'pretrained_cfg\.input_size=32 is .*: \(channels, height'
    ):
        create_model(name, **SMALL, pretrained_cfg={'input_size': 32})
    described = tmp_path / 'hub' / 'config.json'
    content = json.loads(described.read_text())
    del content['pretrained_cfg'][missing]
    content['pretrained_cfg'] |= half
    described.write_text(json.dumps(content))
    weights = str(tmp_path / 'hub' / 'model.safetensors')
    with pytest.raises(ValueError, match=rf"config\.json': {stated}=\[0\.5.* {allowed}"):
        create_model('vit_tiny_smoe', upcycle=weights, **SMALL)


@pytest.mark.parametrize('way', ['upcycle', 'overlay', 'stated'])
def test_timm_loads_a_checkpoint_of_a_run(way: str, tmp_path: Path) -> None:
    state = timm.create_model(AUGREG, **SMALL).state_dict()
    kept = {f'model.{name}': value for name, value in state.items()}
    path = run_file(tmp_path, normalization=IMAGENET.values(), **kept)
    stated = vars(GREY) if way == 'stated' else {}
    overlay = {'pretrained': True, 'pretrained_cfg_overlay': {'file': path, **stated}}
    arguments: dict[str, Any] = {'upcycle': path} if way == 'upcycle' else overlay
    model = create_model('vit_tiny_smoe', **SMALL, **arguments)
    found = weights_normalization(model, None, arguments)
    assert found is not None
    assert not found.differing(GREY if stated else IMAGENET)


def test_a_checkpoint_counts_before_what_timm_has_loaded(tmp_path: Path) -> None:
    dense(tmp_path)
    arguments = {'upcycle': f'local-dir:{tmp_path}/hub'}
    model = create_model('vit_tiny_smoe', **SMALL, **arguments)
    assert weights_normalization(model, str(tmp_path / 'bare.pth'), arguments) is None


def test_it_is_what_the_model_kept(tmp_path: Path) -> None:
    assert read_normalization(run_file(tmp_path, normalization=GREY.values())) == GREY
    # of a model that was saved before a training, and of a run of mmseg
    assert read_normalization(run_file(tmp_path, normalization=torch.zeros(2, 3))) is None
    assert read_normalization(run_file(tmp_path)) is None


def test_rounded_numbers_are_the_same() -> None:
    assert not Normalization.of({'mean': [124, 116, 104], 'std': [58, 57, 57]}, 255).differing(
        IMAGENET
    )
    assert GREY.differing(IMAGENET) == ('mean', 'std')
    assert Normalization(IMAGENET.mean, GREY.std).differing(IMAGENET) == ('std',)


def test_what_a_config_states_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert must_change(GREY, IMAGENET, (), 'transform')
    assert not must_change(IMAGENET, IMAGENET, ('mean', 'std'), 'transform')
    other = Normalization(GREY.mean, IMAGENET.std)
    assert must_change(other, IMAGENET, ('std',), 'transform')
    lines: list[tuple[str, int]] = []
    monkeypatch.setattr(
        normalization, 'print_log', lambda line, logger, level: lines.append((line, level))
    )
    assert not must_change(other, IMAGENET, ('mean',), 'a.b', 255)
    ((line, level),) = lines
    assert line.startswith('a.b ') and '[123.675,116.28,103.53]' in line
    assert level == logging.WARNING
