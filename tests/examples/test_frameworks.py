"""Where users already are: folders in transformers, and examples as their files run them."""

import importlib
import json
import re
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from vqmoe_vision import collect_losses, update_state
from vqmoe_vision.engine.publish import publish_folder
from vqmoe_vision.moe import METHODS

from ..engine.test_publish import CONFIG, OF_RUN
from ..runs import leave_run

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning'),
    pytest.mark.filterwarnings('ignore::UserWarning'),
]
EXAMPLES = Path(__file__).parents[2] / 'examples'
PAGE = (EXAMPLES.parent / 'docs/how-to/frameworks.md').read_text()


def equal(one: torch.Tensor, two: torch.Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize('method', [*METHODS, None])
def test_a_published_folder_is_read_by_transformers_and_by_timm_again(method, tmp_path):
    transformers = pytest.importorskip('transformers')
    options = {**OF_RUN, 'model.model_name': f'vit_tiny_{method}', 'model.moe.num_experts': 2}
    if method is None:
        options |= {'model.model_name': 'vit_tiny_patch16_224', 'model.moe': None}
        options = {n: value for n, value in options.items() if not n.startswith('model.moe.')}
    leave_run(tmp_path / 'run', CONFIG, options, 'abcdefghij')
    folder = publish_folder(str(tmp_path / 'run'), str(tmp_path / 'out'))
    images = torch.randn(2, 3, 48, 48)
    model: Any = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    for place in (folder, tmp_path / 'again'):
        classifier = transformers.AutoModelForImageClassification.from_pretrained(place).eval()
        features = transformers.AutoModel.from_pretrained(place).eval()
        equal(classifier(images).logits, model(images))
        equal(features(images).last_hidden_state, model.forward_features(images))
        assert [*classifier.config.label2id] == [*'abcdefghij']
        again: Any = timm.create_model(f'local-dir:{place}', pretrained=True).eval()
        equal(again(images), model(images))
        classifier.save_pretrained(tmp_path / 'again')
    # trained on there, it is no damaged file
    classifier.timm_model.head.bias += 1
    classifier.save_pretrained(tmp_path / 'again')
    again = timm.create_model(f'local-dir:{tmp_path / "again"}', pretrained=True).eval()
    torch.testing.assert_close(again(images), model(images) + 1)


@torch.no_grad()
@pytest.mark.parametrize('method', METHODS)
def test_a_backbone_of_transformers_gives_maps(method):
    transformers = pytest.importorskip('transformers')
    config = transformers.TimmBackboneConfig(backbone=f'vit_tiny_{method}', out_indices=(1, 11))
    backbone = transformers.TimmBackbone(config).eval()
    images = torch.randn(1, 3, 224, 224)
    maps = backbone(images).feature_maps
    assert [tuple(each.shape) for each in maps] == [(1, 192, 14, 14)] * 2
    own = timm.create_model(f'vit_tiny_{method}', features_only=True, out_indices=(1, 11)).eval()
    own.load_state_dict(backbone._backbone.state_dict())
    for one, two in zip(maps, own(images), strict=True):
        equal(one, two)


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Imports an example as Python does that is called with its path."""

    def load(name: str) -> Any:
        monkeypatch.syspath_prepend(EXAMPLES)
        return importlib.import_module(name)

    monkeypatch.chdir(tmp_path)
    yield load
    for name in {path.stem for path in EXAMPLES.glob('*.py')}:
        sys.modules.pop(name, None)


@pytest.mark.parametrize('library', ['accelerate', 'lightning_fabric'])
def test_loops_of_libraries_are_that_of_torch(example, library):
    """Of one process all weights and codes are equal to the bit after an epoch."""
    pytest.importorskip(library)
    found, collected = example(f'{library.removeprefix("lightning_")}_digits').main(epochs=1)
    digits = example('digits')
    model, optimizer = digits.build()
    for images, labels in digits.loader(digits.tensors()[0]):
        with collect_losses(model, optimizer) as expected:
            (F.cross_entropy(model(images), labels) + expected.total()).backward()
        optimizer.step()
        optimizer.zero_grad()
    names = {name: name.removeprefix('_forward_module.') for name in collected.losses}  # Fabric's
    auxiliary = {names[name]: v for name, v in collected.losses.items() if name != 'task'}
    torch.testing.assert_close(auxiliary, expected.losses)
    torch.testing.assert_close(found.state_dict(), model.state_dict())


def test_the_trainer_of_transformers_steps_as_a_loop_of_torch(example, tmp_path):
    """With two batches a step: losses of the experts count, and codebooks move once a step."""
    pytest.importorskip('transformers')
    plain = dict(optim='sgd', lr_scheduler_type='constant', max_grad_norm=0, learning_rate=0.1)
    steps = dict(max_steps=3, gradient_accumulation_steps=2, train_sampling_strategy='sequential')
    plain |= dict(weight_decay=0, disable_tqdm=True)
    trainer = example('transformers_digits').main(str(tmp_path), **plain, **steps)
    digits = example('digits')
    model, _ = digits.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = iter(digits.loader(digits.tensors()[0], shuffle=False))
    for batch in range(6):
        images, labels = next(batches)
        with collect_losses(model, update_state=False) as expected:
            ((F.cross_entropy(model(images), labels) + expected.total()) / 2).backward()
        if batch % 2:
            optimizer.step()
            optimizer.zero_grad()
            update_state(model)
    found = trainer.model.timm_model.state_dict()
    torch.testing.assert_close(found, model.state_dict())
    losses = {name.removeprefix('timm_model.'): v for name, v in trainer.collected.losses.items()}
    torch.testing.assert_close(losses, expected.losses)
    assert losses


def test_scenes_are_those_of_the_data_set(example):
    datasets = pytest.importorskip('vqmoe_vision.segmentation').datasets
    for split, index in product(('train', 'test'), range(3)):
        expected = datasets.DigitScenes(split, num_scenes=3, size=96, pipeline=[]).scene(index)
        for one, two in zip(example('scenes').scene(split, index), expected, strict=True):
            assert (one == two).all() and one.dtype == two.dtype


def test_smp_takes_our_encoders_where_its_table_says():
    """Of all decoders that smp has: who refuses ours refuses timm's ViT in the same words."""
    smp = pytest.importorskip('segmentation_models_pytorch')
    names = re.search(r'^\|(Unet.*) of smp\|all\|refused', PAGE, re.MULTILINE)[1].split(', ')
    classes = {name for name in dir(smp) if isinstance(getattr(smp, name), type)}
    assert classes == {*names, 'DPT'}
    for name, encoder in product(names, ['vit_tiny_vqmoe', 'vit_tiny_patch16_224']):
        with pytest.raises(ValueError, match='Unsupported model downsampling pattern'):
            getattr(smp, name)(f'tu-{encoder}', encoder_weights=None)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('decoder, prefix', [('smp', 'tu-'), ('encoder_only', '')])
def test_decoders_of_others_train_every_method(example, method, decoder, prefix):
    """What plain timm models report is collected, and all that an own loop trains changes."""
    if decoder == 'smp':
        pytest.importorskip('segmentation_models_pytorch')
    build, fit = example(f'{decoder}_scenes').build, example('scenes').fit
    model = build(f'{prefix}vit_tiny_{method}')
    refused = re.search(r'^\|encoder-only\|(`.*)\|refused', PAGE, re.MULTILINE)[1]
    if decoder == 'encoder_only' and f'`{method}`' in refused:
        with pytest.raises(ValueError, match='tokens='):
            fit(model, 1)
        return
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    collected = fit(model, 3)
    plain = timm.create_model(f'vit_tiny_{method}', **example('scenes').ENCODER)
    with collect_losses(plain) as expected:
        plain(torch.randn(2, 3, 48, 48))
    place = 'encoder.model.' if decoder == 'smp' else 'vit.'
    assert {*collected.losses} == {place + name for name in expected.losses}
    assert {*collected.stats} == {place + name for name in expected.stats}
    still = [n for n, value in model.named_parameters() if value.equal(before[n])]
    assert not [name for name in still if '.experts.' in name or 'queries' in name], still


def test_examples_learn(example, tmp_path):
    pytest.importorskip('transformers')
    trainer = example('transformers_digits').main(str(tmp_path))
    assert trainer.evaluate()['eval_accuracy'] > 85
    saved = json.loads((tmp_path / 'model/config.json').read_text())
    assert saved['architecture'] == 'vit_tiny_vqmoe'
