"""Trainings of a method that clusters images: the clusters come before the first step, and stay."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import MODELS

from vqmoe_vision.engine.checkpoint import read_state
from vqmoe_vision.engine.cli import load_config, train
from vqmoe_vision.engine.model import scope_of
from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe.raw_patches import image_reader

from ..soak.kinds import FOUR_SCENES, SCENES

METHOD = next(name for name, method in METHODS.items() if method.needs_features)
DIGITS = Path(__file__).parents[2] / 'configs/classification/digits/demo/vit_tiny_vqmoe_demo.py'
SIZES = 'patch_size=16, embed_dim=12, depth=2, num_heads=3'
MOE = 'moe=dict(_delete_=True, num_experts=3, num_clusters=4)'
CLASSIFICATION = f"""
_base_ = {str(DIGITS)!r}
experiment_name = NAME
model = dict(model_name='vit_tiny_{METHOD}', {SIZES}, {MOE})
train_dataloader = dict(batch_size=600)
train_cfg = dict(max_epochs=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=-1))
"""
SEGMENTATION = f"""
_base_ = {str(SCENES)!r}
experiment_name = NAME
model = dict(
    backbone=dict(model_name='vit_tiny_{METHOD}', {SIZES}, {MOE}), decode_head=dict(num_layers=1)
)
{FOUR_SCENES}
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=-1))
"""
READER = '.reader.'


@pytest.fixture
def leave_dense(tmp_path: Path) -> Callable[..., str]:
    """A checkpoint of a dense model of the shape of a config's."""

    def leave(config: str, field: str, std: float | None = None) -> str:
        options = {f'{field}.model_name': 'vit_tiny_patch16_224', f'{field}.moe': None}
        settings = load_config(config, options)
        with scope_of(settings):
            model = MODELS.build(settings.model)
        state = model.state_dict()
        if std is not None:
            state['normalization'] = torch.tensor([[0.5] * 3, [std] * 3])
        torch.save({'state_dict': state}, tmp_path / 'dense.pth')
        return str(tmp_path / 'dense.pth')

    return leave


def write(folder: Path, text: str) -> str:
    (folder / 'tiny.py').write_text(text.replace('NAME', repr(folder.name)))
    return str(folder / 'tiny.py')


def part(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {key.partition(name)[2]: value for key, value in state.items() if name in key}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def test_clusters_come_first_and_a_resumed_run_is_the_same(leave_dense, tmp_path: Path) -> None:
    field, files = 'model.backbone', ('iter_1.pth', 'iter_2.pth')
    config, work = write(tmp_path, SEGMENTATION), tmp_path / 'work'
    dense = leave_dense(config, field)
    given = ['--cfg-options', f'{field}.features={dense}']
    train([config, '--work-dir', str(work), *given])
    first, last = (read_state(str(work / file)) for file in files)
    assert part(first, READER)['fitted']
    assert len(part(first, READER)['centroids'].unique(dim=0)) == 4
    network = part(first, f'{READER}network.')
    saved = read_state(dense)
    assert network and all(
        any(key.endswith(name) and torch.equal(value, other) for key, other in saved.items())
        for name, value in network.items()
    )
    assert equal(part(first, READER), part(last, READER))

    (work / files[1]).unlink()
    (work / 'last_checkpoint').write_text(files[0])
    named = f'experiment_name=resumed {tmp_path.name}'  # it may start within the same second
    # the checkpoint has the features too
    train([config, '--resume', '--work-dir', str(work), '--cfg-options', named])
    assert equal(read_state(str(work / files[1])), last)


def test_a_dense_checkpoint_to_start_from_is_enough(leave_dense, tmp_path: Path) -> None:
    config, work = write(tmp_path, CLASSIFICATION), tmp_path / 'work'
    given = [f'model.checkpoint={leave_dense(config, "model")}', 'train_cfg.max_epochs=1']
    train([config, '--work-dir', str(work), '--cfg-options', *given])
    state = read_state(str(work / 'epoch_1.pth'))
    assert part(state, READER)['fitted']
    assert not torch.equal(state['model.pos_embed'], part(state, READER)['network.pos_embed'])


def test_without_features_a_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r'^error: features=None is not possible: the checkpoint'):
        train([write(tmp_path, CLASSIFICATION), '--work-dir', str(tmp_path / 'work')])


def test_images_are_normalised_as_the_features_want_it(leave_dense, tmp_path: Path) -> None:
    config = write(tmp_path, CLASSIFICATION)
    file = leave_dense(config, 'model', std=0.25)
    settings = load_config(config)
    with scope_of(settings):
        model = MODELS.build(settings.model).model
    found = image_reader(model).before_start(file, False, None)
    assert found.std == (0.25,) * 3
    assert image_reader(model).before_start(file, True, found) == found
    other = type(found)(found.mean, (0.5,) * 3)
    with pytest.raises(ValueError, match=r'features=.* is not possible: weights for images with m'):
        image_reader(model).before_start(file, True, other)
