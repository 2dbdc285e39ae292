"""A Segmenter is fed as the weights that it starts from were, from training to prediction."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.runner import Runner
from mmseg.apis import inference_model, init_model
from mmseg.registry import DATASETS
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf

from vqmoe_vision.engine import cli
from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.trained import load_trained
from vqmoe_vision.models.normalization import KEY
from vqmoe_vision.segmentation.inference import Predictor
from vqmoe_vision.segmentation.preprocessor import completed

from ..rows import CONFIGS
from .conftest import tiny_segmentor
from .test_cli import write_config

IMAGENET = CONFIGS / 'classification/imagenet/vit_tiny_vqmoe_imagenet.py'
# what the classifier and the Segmenter of `write_config` have in common
CLASSIFIER = f"""
_base_ = {str(IMAGENET)!r}
data = dict(data_root=ROOT, dev_size=0, transform=dict(input_size=48))
train_dataloader = dict(batch_size=4, num_workers=0, dataset=data)
val_dataloader = dict(batch_size=4, num_workers=0, dataset=dict(split='val', **data))
test_dataloader = val_dataloader
del data
model = dict(
    img_size=48, patch_size=16, depth=2, embed_dim=12, num_heads=3, num_classes=2,
    class_token=False, global_pool='avg', moe=dict(_delete_=True, preset='matched', num_experts=2),
)
train_cfg = dict(max_epochs=1, val_interval=1)
param_scheduler = []
experiment_name = ROOT
"""
SCENES = [76.5] * 3, [89.25] * 3
WEIGHTS = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


@pytest.fixture(scope='module')
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a classifier that was trained with the normalisation of ImageNet."""
    folder = tmp_path_factory.mktemp('classifier')
    for index in range(8):
        file = folder / 'data' / ('train', 'val')[index // 4] / f'{index % 2}' / f'{index}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (48, 48, 3), np.uint8)).save(
            file
        )
    config = folder / 'classifier.py'
    config.write_text(CLASSIFIER.replace('ROOT', repr(str(folder / 'data'))))
    cli.train([str(config), '--work-dir', str(folder / 'run')])
    return folder / 'run/epoch_1.pth'


@pytest.fixture(scope='module')
def trained(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Config that says nothing of weights, and the work dir of a run that has begun with them."""
    folder = tmp_path_factory.mktemp('segmenter')
    config = write_config(folder, f'follows {folder}')
    train(config, folder / 'run', f'model.backbone.checkpoint={classifier}')
    return config, folder / 'run'


def train(config: str, work: Path, *options: str, resume: bool = False) -> None:
    arguments = [config, '--work-dir', str(work), *(['--resume'] if resume else [])]
    cli.train([*arguments, '--cfg-options', f'experiment_name={work}', *options])


def levels(model: Any) -> tuple[list[float], list[float]]:
    """What images are normalised with: mean and standard deviation, in levels of 0..255."""
    preprocessor = model.data_preprocessor
    mean, std = (value.flatten().tolist() for value in (preprocessor.mean, preprocessor.std))
    return mean, std


def same(found: Any, expected: Any) -> None:
    # float32 keeps seven digits of the numbers
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=0)


def log_of(work: Path) -> str:
    return max(work.glob('*/*.log')).read_text()


def test_a_segmenter_is_fed_as_the_classifier_was(
    classifier: Path, trained: tuple[str, Path]
) -> None:
    _, work = trained
    assert f'{classifier}: images were normalised for it with mean [0.485,0.456' in log_of(work)
    told = 'model.data_preprocessor: mean [123.675,116.28,103.53] and std [58.395,57.12,57.375]'
    assert log_of(work).count(told) == 1
    state = read_content(str(work / 'iter_2.pth'))['state_dict']
    same(state[KEY].tolist(), [IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])


class Fed:
    """What the backbone sees of an image of 100 in every channel."""

    def __init__(self, model: Any) -> None:
        model.backbone.register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0]))
        self.seen: list[torch.Tensor] = []

    def image(self) -> torch.Tensor:
        return self.seen[-1][0, :, 20, 20]


def test_predictions_and_mmsegs_inference_are_fed_the_same(trained: tuple[str, Path]) -> None:
    config, work = trained
    checkpoint, grey = str(work / 'iter_2.pth'), np.full((48, 48, 3), 100, np.uint8)
    predictor = Predictor(config, checkpoint, 'cpu')
    fed = Fed(predictor.model)
    predictor(grey)
    mean, std = map(torch.tensor, WEIGHTS)
    same(fed.image().tolist(), ((100 - mean) / std).tolist())
    model = init_model(config, checkpoint, device='cpu')
    again = Fed(model)
    inference_model(model, grey)
    torch.testing.assert_close(again.image(), fed.image(), rtol=0, atol=0)
    # what timm would save
    same(model.backbone.model.pretrained_cfg['mean'], IMAGENET_DEFAULT_MEAN)
    survey = model.source(load_config(config).test_dataloader.dataset)
    same(survey.normalization.std, IMAGENET_DEFAULT_STD)


@pytest.mark.parametrize('stated', [False, True])
def test_a_survey_sees_what_the_model_is_fed(stated: bool) -> None:
    numbers = dict(mean=[10.0, 20.0, 30.0], std=[40.0, 50.0, 60.0]) if stated else {}
    preprocessor = dict(type='CheckedPreProcessor', bgr_to_rgb=True, size=(32, 32), **numbers)
    model = tiny_segmentor(data_preprocessor=preprocessor)
    steps = [dict(type='PackSegInputs')]
    dataset = dict(type='DigitScenes', split='dev', num_scenes=1, size=64, pipeline=steps)
    source = model.source(ConfigDict(dataset))
    (scene,) = DATASETS.build(dataset)
    fed = model.data_preprocessor(
        dict(inputs=[scene['inputs']], data_samples=[scene['data_samples']]), False
    )['inputs'][0]
    middle = fed[:, 16:48, 16:48]
    torch.testing.assert_close(source.samples[0].image, middle, rtol=0, atol=0)
    pixels = source.normalization.pixels(middle[None])[0]
    expected = scene['inputs'].flip(0)[:, 16:48, 16:48] / 255
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


def test_a_survey_refuses_what_normalises_in_an_unknown_way() -> None:
    model = tiny_segmentor()
    model.data_preprocessor = torch.nn.Identity()
    with pytest.raises(ValueError, match="type='Identity' is not possible: one of mm"):
        model.source(ConfigDict())


def runner_of(config: str, work: Path, **fields: Any) -> Runner:
    settings = load_config(config)
    settings.update(work_dir=str(work), experiment_name=str(work), **fields)
    return Runner.from_cfg(settings)


def test_training_and_tests_are_fed_the_same(
    classifier: Path, trained: tuple[str, Path], tmp_path: Path
) -> None:
    config, work = trained
    runner = runner_of(config, tmp_path / 'train', train_cfg=dict(max_iters=1))
    runner.model.backbone.checkpoint = str(classifier)
    runner.train()
    test = runner_of(config, tmp_path / 'test', load_from=str(work / 'iter_2.pth'))
    assert levels(test.model) == SCENES
    test.test()
    same(levels(test.model), WEIGHTS)
    assert levels(test.model) == levels(runner.model)
    # with the config that the run has left
    again = runner_of(
        str(next(work.glob('*.py'))), tmp_path / 'left', load_from=str(work / 'iter_2.pth')
    )
    again.test()
    assert levels(again.model) == levels(runner.model)


def test_augmented_tests_are_fed_the_same(trained: tuple[str, Path], tmp_path: Path) -> None:
    config, work = trained
    settings = load_config(config)
    cli.augment_test(settings)
    settings.update(work_dir=str(tmp_path), experiment_name=str(tmp_path))
    settings.load_from = str(work / 'iter_2.pth')
    runner = Runner.from_cfg(settings)
    runner.test()
    same(levels(runner.model.module), WEIGHTS)


def test_numbers_that_contradict_count_with_one_warning(
    classifier: Path, trained: tuple[str, Path], tmp_path: Path
) -> None:
    config, _ = trained
    field = 'model.data_preprocessor'
    wrong = [f'{field}.mean=[127.5,127.5,127.5]', f'{field}.std=[127.5,127.5,127.5]']
    start = f'model.backbone.checkpoint={classifier}'
    train(config, tmp_path / 'w', start, *wrong, 'train_cfg.max_iters=1')
    (log,) = (tmp_path / 'w').glob('*/*.log')
    lines = log.read_text().splitlines()
    (line,) = [line for line in lines if ' - WARNING - ' in line and 'contradict' in line]
    assert field in line
    kept = torch.load(tmp_path / 'w/iter_1.pth', weights_only=True)['state_dict']['normalization']
    torch.testing.assert_close(kept, torch.full((2, 3), 0.5))


@pytest.mark.parametrize('place', ['', '.from_scratch'])
@pytest.mark.parametrize(
    ('numbers', 'message'),
    [
        (dict(mean=[0.485, 0.456, 0.406], std=[58.395, 57.12, 57.375]), 'mean=.* in levels of 0'),
        (dict(mean=[123.675, 116.28, 103.53], std=[0.229, 0.224, 0.225]), 'std=.* in levels of 0'),
        (dict(mean=[256.0] * 3, std=[1.0] * 3), 'mean=.* from 0 to 255'),
        (dict(mean='abc', std=[1.0] * 3), "mean='abc' is not possible: a list with a number from"),
        (dict(mean=[127.5] * 3), r'mean=.*: beside model\.data_preprocessor{}\.std, mean'),
        (dict(std=[127.5] * 3), r'std=.*: beside model\.data_preprocessor{}\.mean, mean'),
    ],
)
def test_numbers_that_no_images_have_are_refused(
    place: str, numbers: dict[str, Any], message: str
) -> None:
    config = numbers if place == '' else dict(from_scratch=numbers)
    field = r'^model\.data_preprocessor' + place.replace('.', r'\.')
    with pytest.raises(ValueError, match=rf'{field}\.{message.format(place)}'):
        tiny_segmentor(data_preprocessor=dict(type='CheckedPreProcessor', size=(32, 32), **config))


def test_images_that_are_not_normalised_are_no_mistake() -> None:
    for numbers in (dict(mean=[0.0] * 3, std=[1.0] * 3), dict(mean=[0, 0, 0], std=[255, 255, 255])):
        preprocessor = dict(type='CheckedPreProcessor', size=(32, 32), **numbers)
        assert levels(tiny_segmentor(data_preprocessor=preprocessor)) == tuple(numbers.values())


def test_a_preprocessor_of_mmseg_that_does_not_normalise_contradicts(
    classifier: Path, trained: tuple[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / 'bare.py'
    plain = "dict(_delete_=True, type='CheckedPreProcessor', bgr_to_rgb=True, size=(48, 48))"
    path.write_text(f'_base_ = {trained[0]!r}\nmodel = dict(data_preprocessor={plain})\n')
    train(str(path), tmp_path / 'w', f'model.backbone.checkpoint={classifier}')
    (log,) = (tmp_path / 'w').glob('*/*.log')
    assert 'model.data_preprocessor states mean [0,0,0]' in log.read_text()


def test_weights_of_which_nothing_is_known_change_nothing(
    classifier: Path, trained: tuple[str, Path], tmp_path: Path
) -> None:
    state = read_content(str(classifier))['state_dict']
    bare = tmp_path / 'bare.pth'
    torch.save({k[6:]: v for k, v in state.items() if k.startswith('model.')}, bare)
    config, _ = trained
    options = [f'model.backbone.checkpoint={bare}', 'train_cfg.max_iters=1']
    train(config, tmp_path / 'w', *options)
    assert f'{bare}: how images were normalised for it is not known' in log_of(tmp_path / 'w')
    model = load_trained(load_config(config), str(tmp_path / 'w/iter_1.pth'), 'cpu')
    assert levels(model) == SCENES
    same(model.backbone.model.pretrained_cfg['mean'], [0.3] * 3)


@pytest.mark.parametrize('way', ['checkpoint', 'checkpoint_path'])
def test_what_is_stated_of_a_bare_file_is_obeyed(way: str, tmp_path: Path) -> None:
    torch.save(tiny_segmentor().backbone.model.state_dict(), tmp_path / 'bare.pth')
    numbers = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    backbone = {way: str(tmp_path / 'bare.pth'), 'pretrained_cfg_overlay': numbers}
    scratch = dict(mean=SCENES[0], std=SCENES[1])
    preprocessor = dict(type='CheckedPreProcessor', size=(32, 32), from_scratch=scratch)
    model = tiny_segmentor(backbone=backbone, data_preprocessor=preprocessor)
    model.init_weights()
    model.normalize_inputs({})
    same(model.state_dict()[KEY].tolist(), [*numbers.values()])
    same(levels(model), ([25.5, 51, 76.5], [102, 127.5, 153]))


def test_weights_of_timm_are_followed(trained: tuple[str, Path], tmp_path: Path) -> None:
    config, work = trained
    model = load_trained(load_config(config), str(work / 'iter_2.pth'), 'cpu').backbone.model
    save_for_hf(model, tmp_path / 'hub')
    saved = json.loads((tmp_path / 'hub/config.json').read_text())['pretrained_cfg']
    same(saved['std'], IMAGENET_DEFAULT_STD)
    model.pretrained_cfg.update(mean=(0.5,) * 3, std=(0.25,) * 3)
    save_for_hf(model, tmp_path / 'hub')
    options = [f'model.backbone.upcycle=local-dir:{tmp_path}/hub', 'train_cfg.max_iters=1']
    train(config, tmp_path / 'w', *options)
    model = load_trained(load_config(config), str(tmp_path / 'w/iter_1.pth'), 'cpu')
    same(levels(model), ([127.5] * 3, [63.75] * 3))


@pytest.mark.parametrize('path', sorted((CONFIGS / 'segmentation').rglob('[!_]*.py')), ids=str)
def test_from_scratch_nothing_has_changed(path: Path) -> None:
    preprocessor = load_config(str(path)).model.data_preprocessor
    config, stated = completed(preprocessor)
    expected = SCENES if 'digits' in path.name else ([127.5] * 3, [127.5] * 3)
    assert (config['mean'], config['std']) == expected
    # the rows of a comparison are fed alike
    assert stated == (('mean', 'std') if '4x128' in path.name else ())
