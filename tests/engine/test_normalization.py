"""What is known of how images were normalised for weights."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf

from vqmoe_vision.engine.model import read_normalization, weights_normalization
from vqmoe_vision.models.create import create_model
from vqmoe_vision.models.normalization import Normalization

from .. import cases

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
    torch.save({'state_dict': state, 'meta': {'cfg': SEGMENTATION}}, folder / 'run.pth')
    return str(folder / 'run.pth')


@cases(
    'name, arguments, expected',
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
    (AUGREG, {'pretrained': True, 'cfg': '{}/bare.pth', **vars(GREY)}, GREY),
    ('vit_tiny_smoe', {'pretrained': True, 'cfg': '{}/hub/model.safetensors'}, IMAGENET),
    ('vit_tiny_smoe', {'pretrained': True, 'cfg': '{}/bare.pth'}, None),
)
def test_weights_that_timm_loads(name, arguments, expected, tmp_path):
    dense(tmp_path)
    placed = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in arguments.items()}
    said = {k: placed.pop(k) for k in ('file', 'cfg', 'mean', 'std') if k in placed}
    if 'cfg' in said:
        placed['pretrained_cfg'] = {'file': said.pop('cfg'), **said}
    elif said:
        placed['pretrained_cfg_overlay'] = said
    model = create_model(name, **{**SMALL, 'num_classes': 1000}, **placed)
    assert weights_normalization(model, None, placed) == expected


@pytest.mark.parametrize('way', ['upcycle', 'overlay', 'stated'])
def test_timm_loads_a_checkpoint_of_a_run(way, tmp_path):
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


def test_it_is_what_the_model_kept(tmp_path):
    assert read_normalization(run_file(tmp_path, normalization=GREY.values())) == GREY
    # of a model that was saved before a training, and of a run of mmseg
    assert read_normalization(run_file(tmp_path, normalization=torch.zeros(2, 3))) is None
    assert read_normalization(run_file(tmp_path)) is None
