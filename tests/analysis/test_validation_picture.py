"""The picture of a validation, read back from the event files of real trainings of both tasks."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vqmoe_vision.analysis import token_experts
from vqmoe_vision.analysis.pictures import CELL, GAP, LIGHTEN, expert_colours
from vqmoe_vision.analysis.source import images_of
from vqmoe_vision.analysis.validation_picture import picture
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.model import load_trained, scope_of
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe import METHODS

from ..engine.tiny import DIGITS, OPTIONS, config_of, trained
from ..runs import train
from ..segmentation.test_cli import write_config
from .conftest import make

AS_IT_IS = Normalization((0.0,) * 3, (1.0,) * 3)
SIDE, PATCHES = 48, 3  # pixels of an image, and patches of a side, in both


def read_back(folder: Path) -> list[Any]:
    (file,) = folder.glob('*/vis_data/events.out.tfevents*')
    found = EventAccumulator(str(file), size_guidance={'images': 0})
    return found.Reload().Images('experts')


def cell(shown: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = row * (CELL + GAP), column * (CELL + GAP)
    return shown[top : top + CELL, left : left + CELL]


def experts_of(photo: np.ndarray, tinted: np.ndarray, number: int) -> list[int]:
    """Of each patch the expert whose colour it has, by the photograph above it."""
    found, colours, side = [], expert_colours(number).numpy(), len(photo) // PATCHES
    for patch in np.ndindex(PATCHES, PATCHES):
        place = tuple(slice(i * side + 2, (i + 1) * side - 2) for i in patch)
        light = LIGHTEN * photo[place].mean(-1, keepdims=True)
        off = [np.abs(colour + light * (1 - colour) - tinted[place]).max() for colour in colours]
        assert min(off) < 2 / 255  # of rounding
        found.append(int(np.argmin(off)))
    return found


@pytest.mark.parametrize('task', ['classification', 'segmentation'])
def test_an_event_file_has_the_colours_of_the_experts(task, tmp_path):
    options, path, steps, checkpoint = OPTIONS, str(DIGITS), [10, 20], 'epoch_2.pth'
    if task == 'segmentation':
        options, path = {}, write_config(tmp_path, 'pictures')
        steps, checkpoint = [2], 'iter_2.pth'
    pairs = [f'{name}={value}' for name, value in options.items()]
    images = read_back(train(path, tmp_path / 'run', *pairs))
    assert [image.step for image in images] == steps
    shown = np.array(Image.open(io.BytesIO(images[-1].encoded_image_string))) / 255
    config = load_config(path, options)
    model = load_trained(config, str(tmp_path / 'run' / checkpoint), 'cpu')
    with scope_of(config):
        source = model.source(config.val_dataloader.dataset).drawn(4)
    number = next(m for m in model.routed_model.modules() if hasattr(m, 'num_experts')).num_experts
    strip = cell(shown, 0, 0)[CELL // 2, CELL // (2 * number) :: CELL // number][:number]
    np.testing.assert_allclose(strip, expert_colours(number), atol=1 / 255)
    for column, batch in enumerate(source.batches(1)):
        pixels = source.normalization.pixels(images_of(batch))[0]
        middle = pixels[:, SIDE // 2, SIDE // 2].clamp(0, 1)
        photo = cell(shown, 0, 1 + column)[CELL // 2 + 1, CELL // 2 + 1]
        np.testing.assert_allclose(photo, middle, atol=1 / 255)
        experts = token_experts(model.routed_model, images_of(batch))
        assert len(experts) == round(shown.shape[0] / (CELL + GAP)) - 1
        for row, chosen in enumerate(experts.values()):
            right = chosen[0, -PATCHES * PATCHES :, 0].tolist()
            pair = cell(shown, 0, 1 + column), cell(shown, 1 + row, 1 + column)
            found = experts_of(*pair, number)
            assert found == right
            assert found != [number - 1 - expert for expert in right]  # as if they were exchanged
    assert column == min(4, len(source.found)) - 1  # of three scenes all


def test_without_a_tracker_nothing_is_drawn_and_nothing_else_changes(tmp_path):
    short = {'train_cfg.max_epochs': 1}
    local = {'visualizer.vis_backends': [dict(type='LocalVisBackend')], **short}
    runs = [trained(config_of(tmp_path / str(n), **o)) for n, o in enumerate((local, short))]
    assert [len([*Path(run.work_dir).glob('*/vis_data/vis_image/*')]) for run in runs] == [0, 1]
    one, other = (run.model.state_dict() for run in runs)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize('method', METHODS)
def test_every_method_has_a_picture(method):
    # images of two sizes; a row of photographs and one for each that decides
    images = [torch.randn(2, 3, 32, 32), torch.randn(1, 3, 32, 32)]
    model = make(method)
    shown = picture(model, images, Normalization((0.5,) * 3, (0.5,) * 3))
    rows, left = divmod(len(shown) + GAP, CELL + GAP)
    assert (shown.dtype, shown.shape[1:], left) == (np.uint8, (4 * (CELL + GAP) - GAP, 3), 0)
    assert rows == 1 + (2 if method == 'vqmoe' else 1)
