"""A Segmenter is fed as the weights that it starts from were, from training to prediction."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.apis import inference_model, init_model
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.registry import DATASETS, MODELS
from mmseg.structures import SegDataSample

from vqmoe_vision.engine import cli
from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.models.normalization import KEY
from vqmoe_vision.segmentation.inference import Predictor
from vqmoe_vision.segmentation.preprocessor import CheckedPreProcessor, converts_channels

from .. import cases, refused
from ..rows import CONFIGS
from ..runs import NORMALIZATION, leave_run, train
from .conftest import tiny_segmentor
from .test_cli import write_config

# what a classifier and the Segmenter of `write_config` have in common
SMALL = dict(img_size=48, patch_size=16, depth=2, embed_dim=12, num_heads=3, class_token=False)
WEIGHTS = [25.5, 51.0, 76.5], [102.0, 127.5, 153.0]


@pytest.fixture(scope='module')
def classifier(tmp_path_factory) -> Path:
    """Checkpoint of a classifier that was trained with a normalisation of its own."""
    run = tmp_path_factory.mktemp('classifier') / 'run'
    config = str(CONFIGS / 'classification/digits/demo/vit_tiny_vqmoe_demo.py')
    options = {f'model.{k}': v for k, v in SMALL.items()} | {'model.moe.num_experts': 2}
    leave_run(run, config, options, 'abcdefghij')
    return run / 'epoch_1.pth'


@pytest.fixture(scope='module')
def trained(classifier, tmp_path_factory) -> tuple[str, Path]:
    """Config that says nothing of weights, and the work dir of a run that has begun with them."""
    folder = tmp_path_factory.mktemp('segmenter')
    config = write_config(folder, f'follows {folder}')
    return config, train(config, folder / 'run', f'model.backbone.checkpoint={classifier}')


def levels(model: Any) -> list[list[float]]:
    """What images are normalised with: mean and standard deviation, in levels of 0..255."""
    preprocessor = model.data_preprocessor
    return [value.flatten().tolist() for value in (preprocessor.mean, preprocessor.std)]


def same(found: Any, expected: Any) -> None:
    # float32 keeps seven digits of the numbers
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=0)


def log_of(work: Path) -> str:
    return max(work.glob('*/*.log')).read_text()


def test_a_segmenter_is_fed_as_the_classifier_was(classifier, trained):
    config, work = trained
    assert f'{classifier}: images are normalised with mean [0.1,0.2,0.3]' in log_of(work)
    told = 'model.data_preprocessor: mean [25.5,51,76.5] and std [102,127.5,153]'
    assert log_of(work).partition(' - Trained, ')[0].count(told) == 1  # loading says it again
    checkpoint, grey = str(work / 'iter_2.pth'), np.full((48, 48, 3), 100, np.uint8)
    state = read_content(checkpoint)['state_dict']
    same(state[KEY].tolist(), [NORMALIZATION.mean, NORMALIZATION.std])
    predictor = Predictor(config, checkpoint, 'cpu')
    model, seen = init_model(config, checkpoint, device='cpu'), []
    for each in (predictor.model, model):
        each.backbone.register_forward_pre_hook(lambda _, x: seen.append(x[0][0, :, 20, 20]))
    predictor(grey)
    inference_model(model, grey)
    mean, std = map(torch.tensor, WEIGHTS)
    same(seen[0].tolist(), ((100 - mean) / std).tolist())
    assert all(torch.equal(pixels, seen[0]) for pixels in seen)
    same(model.backbone.model.pretrained_cfg['mean'], NORMALIZATION.mean)
    survey = model.source(load_config(config).test_dataloader.dataset)
    same(survey.normalization.std, NORMALIZATION.std)


@pytest.mark.parametrize('stated', [False, True])
def test_a_survey_sees_what_the_model_is_fed(stated):
    numbers = dict(mean=[10.0, 20.0, 30.0], std=[40.0, 50.0, 60.0]) if stated else {}
    preprocessor = dict(type='CheckedPreProcessor', bgr_to_rgb=True, size=(32, 32), **numbers)
    model = tiny_segmentor(data_preprocessor=preprocessor)
    steps = [dict(type='PackSegInputs')]
    dataset = dict(type='DigitScenes', split='dev', num_scenes=1, size=64, pipeline=steps)
    source = model.source(ConfigDict(dataset))
    (scene,) = DATASETS.build(dataset)
    batch = dict(inputs=[scene['inputs']], data_samples=[scene['data_samples']])
    middle = model.data_preprocessor(batch, False)['inputs'][0][:, 16:48, 16:48]
    assert torch.equal(source.read(source.found[0]).image, middle)
    pixels = source.normalization.pixels(middle[None])[0]
    expected = scene['inputs'].flip(0)[:, 16:48, 16:48] / 255
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


def test_training_and_tests_are_fed_the_same(trained, tmp_path):
    config, work = trained
    augmented, left = load_config(config), load_config(str(next(work.glob('*.py'))))
    cli.augment_test(augmented)
    for name, settings in (('test', load_config(config)), ('tta', augmented), ('left', left)):
        settings.update(work_dir=str(tmp_path / name), experiment_name=f'{tmp_path}{name}')
        settings.load_from = str(work / 'iter_2.pth')
        test = Runner.from_cfg(settings)
        test.test()
        same(levels(getattr(test.model, 'module', test.model)), WEIGHTS)


def test_numbers_that_contradict_count_with_one_warning(classifier, trained, tmp_path):
    field = 'model.data_preprocessor'
    wrong = [f'{field}.{name}=[127.5,127.5,127.5]' for name in ('mean', 'std')]
    train(trained[0], tmp_path / 'w', f'model.backbone.checkpoint={classifier}', *wrong)
    lines = log_of(tmp_path / 'w').splitlines()
    (line,) = [line for line in lines if ' - WARNING - ' in line and 'contradict' in line]
    assert field in line
    state = read_content(str(tmp_path / 'w/iter_2.pth'))['state_dict']
    same(state[KEY].tolist(), [[0.5] * 3] * 2)


@pytest.mark.parametrize('place', ['', '.from_scratch'])
@cases(
    'named, numbers',
    ('mean', dict(mean=[0.485, 0.456, 0.406], std=[58.395, 57.12, 57.375])),
    ('std', dict(mean=[123.675, 116.28, 103.53], std=[0.229, 0.224, 0.225])),
    ('mean', dict(mean=[256.0] * 3, std=[1.0] * 3)),
    ('mean', dict(mean=[127.5] * 3)),
    ('std', dict(std=[127.5] * 3)),
)
def test_numbers_that_no_images_have_are_refused(place, named, numbers):
    config = numbers if place == '' else dict(from_scratch=numbers)
    given = dict(type='CheckedPreProcessor', size=(32, 32), **config)
    said = rf'^model\.data_preprocessor{place}\.{named}='
    refused(said, tiny_segmentor, data_preprocessor=given)


@pytest.mark.parametrize('stated', [False, True])
@pytest.mark.parametrize('way', ['checkpoint', 'checkpoint_path'])
def test_a_bare_file_changes_nothing_but_what_is_stated_of_it(way, stated, tmp_path):
    torch.save(tiny_segmentor().backbone.model.state_dict(), tmp_path / 'bare.pth')
    numbers = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]) if stated else {}
    backbone = {way: str(tmp_path / 'bare.pth'), 'pretrained_cfg_overlay': numbers}
    scratch = dict(mean=[76.5] * 3, std=[89.25] * 3)
    preprocessor = dict(type='CheckedPreProcessor', size=(32, 32), from_scratch=scratch)
    model = tiny_segmentor(backbone=backbone, data_preprocessor=preprocessor)
    model.init_weights()
    model.normalize_inputs({})
    expected = ([25.5, 51, 76.5], [102, 127.5, 153]) if stated else list(scratch.values())
    same(levels(model), expected)
    same((model.state_dict()[KEY] * 255).tolist(), expected)


@pytest.mark.parametrize('converts', [True, False])
@pytest.mark.parametrize('training', [True, False])
def test_images_are_prepared_as_by_mmseg(converts, training):
    options = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], bgr_to_rgb=converts)
    ours = MODELS.build(dict(type='CheckedPreProcessor', size=(8, 8), **options))
    assert type(ours) is CheckedPreProcessor and ours._non_blocking
    images = [torch.randint(256, (3, 6, 6), dtype=torch.uint8) for _ in range(2)]
    results = []
    for preprocessor in (ours, SegDataPreProcessor(size=(8, 8), **options)):
        samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.ones(1, 6, 6))) for _ in images]
        data = {'inputs': list(images), 'data_samples': samples}
        results.append(preprocessor(data, training)['inputs'])
    assert torch.equal(*results)
    assert converts_channels(ours) is converts_channels(preprocessor) is converts
