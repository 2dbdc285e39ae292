"""From the work dir of a classifier to a folder that timm reads, and back into a training."""

import csv
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

from vqmoe_vision.classification import Classifier
from vqmoe_vision.classification.datasets import digits
from vqmoe_vision.engine.checkpoint import load_from_local, read_state
from vqmoe_vision.engine.cli import load_config, predict
from vqmoe_vision.engine.model import load_trained
from vqmoe_vision.engine.publish import publish
from vqmoe_vision.models.create import create_model

from .. import refused
from ..damaged import flip
from ..rows import CONFIGS, ROWS, row_options
from ..runs import NORMALIZATION, leave_run, score, train

DIGITS = str(CONFIGS / 'classification/digits/demo/vit_tiny_vqmoe_demo.py')
SMALL: dict[str, Any] = dict(
    img_size=48, patch_size=16, depth=4, embed_dim=12, num_heads=3, class_token=False,
    global_pool='avg', num_classes=10,
)  # fmt: skip
OPTIONS = {f'model.{name}': value for name, value in SMALL.items()}
CODE = re.compile(r'^```python\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    """Work dir of a run of one epoch that was validated, and what its test has written."""
    folder = tmp_path_factory.mktemp('trained')
    options = {**OPTIONS, 'train_cfg': dict(max_epochs=1, val_interval=1)}
    options |= {'train_dataloader.batch_size': 600, 'model.moe.num_experts': 2}
    options |= {'test_dataloader.dataset.transform.crop_pct': 0.8}
    config = load_config(DIGITS, options)
    config.default_hooks.checkpoint.interval = 1
    config.dump(folder / 'tiny.py')
    run = train(folder / 'tiny.py', folder / 'run')
    score(run / 'tiny.py', run / 'epoch_1.pth', folder)
    return run


def equal(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def same(model: Any, again: Any) -> None:
    for name, value in model.state_dict().items():
        equal(again.state_dict()[name], value)
    images = torch.randn(2, 3, 48, 48)
    equal(again.eval()(images), model.eval()(images))


def test_the_run_as_a_folder_of_timm(trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'sub/my-model'
    numbers = trained.parent / 'scores.json'
    # the line of the page, with the reader's own files in their place
    places = {'RUN': str(trained), 'my-model': str(out), 'numbers': str(numbers)}
    page = (CONFIGS.parent / 'docs/how-to/weights-out.md').read_text()
    (line, *_) = re.findall(r'^python tools/publish.py (work_dirs/RUN .*)$', page, re.MULTILINE)
    publish([places.get(Path(word).stem, word) for word in line.split()])
    assert capsys.readouterr().out == f'wrote {out}\n'
    assert sorted(path.name for path in out.parent.iterdir()) == ['my-model']
    files = ['README.md', 'config.json', 'model.safetensors', 'tiny.py']
    assert sorted(path.name for path in out.iterdir()) == files
    model: Any = timm.create_model(f'local-dir:{out}', pretrained=True)
    config = load_config(str(trained / 'tiny.py'))
    (best,) = trained.glob('best_*.pth')
    same(load_trained(config, str(best), 'cpu').model, model)
    data = digits('test', config.test_dataloader.dataset.transform)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 60, 3), np.uint8))
    equal(create_transform(**resolve_model_data_config(model))(photo), data.transform(photo))
    card = ModelCard.load(out / 'README.md')
    scores = json.loads(numbers.read_text())
    assert re.findall(r'^- (\w+): `digits`, split `(\w+)`$', card.text, re.M) == [
        ('training', 'train'), ('validation', 'dev'), ('test', 'test')
    ]  # fmt: skip
    assert '| validation | accuracy/top1 |' in card.text
    # of epoch_1.pth, which has the weights of the best
    assert (card.data.license, card.data.library_name) == ('cc0-1.0', 'timm')
    assert f'| test | accuracy/top1 | {scores["accuracy/top1"]:.4g} |' in card.text
    assert 'python tools/train.py tiny.py' in card.text
    assert best.name in card.text and 'mean of 0.3, 0.3, 0.3 and' in card.text
    # what the card says is run, and so is the config in the folder
    photo.save(out / 'image.png')
    monkeypatch.chdir(out)
    (code,) = CODE.findall(card.text)
    assert 'import vqmoe_vision' in code  # here it has been imported before
    exec(compile(code, 'card', 'exec'), {})
    label, probability = capsys.readouterr().out.split()
    assert label in '0123456789' and 0 < float(probability) < 1
    assert 'work_dir' not in load_config('tiny.py')
    assert load_config('tiny.py').model == config.model


def test_timms_files_are_tested_as_the_checkpoint_is(trained, tmp_path):
    folder, run_config = tmp_path / 'out', str(trained / 'tiny.py')
    publish([str(trained), str(folder)])
    expected = json.loads((trained.parent / 'scores.json').read_text())
    assert score(run_config, folder, tmp_path) == pytest.approx(expected)
    config = load_config(run_config)
    (best,) = trained.glob('best_*.pth')
    model, weights = load_trained(config, str(best), 'cpu'), folder / 'model.safetensors'
    torch.save(load_file(weights), folder / 'pytorch_model.bin')
    for place in (folder, weights, folder / 'pytorch_model.bin'):
        again = load_trained(config, str(place), 'cpu')
        same(model.model, again.model)
        assert not again.known_normalization.differing(model.known_normalization)
        read = load_from_local(str(place), 'cpu')
        assert model.misfit(read['state_dict']) == ''
    shorter = load_config(run_config, {'model.depth': 3})
    refused(r'unexpected keys: model\.blocks\.3', load_trained, shorter, str(folder), 'cpu')


@pytest.mark.parametrize('row', ROWS)
def test_every_row_of_a_comparison(row, tmp_path):
    options = {**OPTIONS, **row_options(row), 'model.drop_path_rate': 0.1}
    run = leave_run(tmp_path / 'run', DIGITS, options, 'abcdefghij')
    publish([str(tmp_path / 'run'), str(tmp_path / 'out')])
    model: Any = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    same(run.model, model)
    assert model.pretrained_cfg['label_names'] == list('abcdefghij')
    assert model.pretrained_cfg['mean'] == pytest.approx(NORMALIZATION.mean)
    file = tmp_path / 'out/model.safetensors'
    again = Classifier(**{**load_config(DIGITS, options).model, 'type': None}, checkpoint=str(file))
    again.init_weights()
    assert again.known_normalization is not None
    assert not again.known_normalization.differing(NORMALIZATION)
    for name, value in again.model.named_parameters():
        equal(value, run.model.get_parameter(name))


def test_numbers_of_another_epoch_are_refused(trained, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(trained, run)
    (best,) = run.glob('best_*.pth')
    content = torch.load(best, weights_only=True)
    content['state_dict']['model.head.bias'] += 1e-6
    torch.save(content, best)
    given = [str(run), str(tmp_path / 'out'), '--numbers', str(trained.parent / 'scores.json')]
    message = r'^error: numbers=.*scores of best_.* and these are of'
    refused(message, publish, given, error=SystemExit)
    assert not (tmp_path / 'out').exists()
    publish([*given, '--checkpoint', str(run / 'epoch_1.pth')])


def test_a_flipped_bit_of_published_weights_is_refused(trained, tmp_path):
    publish([str(trained), str(tmp_path / 'out')])
    weights = tmp_path / 'out/model.safetensors'
    flip(weights, -9)
    source = f'local-dir:{tmp_path / "out"}'
    config = json.loads((tmp_path / 'out/config.json').read_text())
    name, options = config['architecture'], config['model_args']
    for load in (
        lambda: timm.create_model(source, pretrained=True),
        lambda: create_model(name, **options, upcycle=source),
        lambda: create_model(name, **options, upcycle=str(weights)),
        lambda: create_model(name, **options, checkpoint_path=str(weights)),
        lambda: read_state(str(tmp_path / 'out')),
        lambda: load_from_local(str(weights), 'cpu'),
    ):
        refused(r"safetensors' is damaged: .* weights_sha256", load)


def test_mistakes_are_one_line(tmp_path):
    run, out, full, bad = (tmp_path / name for name in ('run', 'out', 'full', 'bad.json'))
    leave_run(run, DIGITS, OPTIONS, 'abcdefghij')
    full.mkdir()
    (full / 'mine').touch()
    bad.write_text('["accuracy"]')
    two, bare, bests, fog = (shutil.copytree(run, tmp_path / f'{i}') for i in range(4))
    shutil.copy(run / 'run.py', two / 'again.py')
    (bare / 'epoch_1.pth').unlink()
    for metric in 'ab':
        shutil.copy(run / 'epoch_1.pth', bests / f'best_{metric}_epoch_1.pth')
    shift: dict[str, Any] = {'test_dataloader.dataset.transform.shift': 'fog_1'}
    load_config(str(run / 'run.py'), shift).dump(fog / 'run.py')
    for arguments, named in (
        (['nowhere', out], "source='nowhere'"),
        ([run / 'epoch_1.pth', out], 'out='),
        ([run / 'epoch_1.pth', 'a.pth', '--license', 'mit'], '--license'),
        ([run, out / 'a.pth'], r"a\.pth'"),
        ([full, out], 'it has'),
        ([two, out], f"{two}'"),
        ([bare, out], f"{bare}'"),
        ([bests, out], r'best_a_.*, best_b_'),
        ([fog, out], r"test_dataloader\.dataset\.transform\.shift='fog_1'"),
        ([run, full], "full'"),
        ([run, out, '--numbers', bad], r'numbers=.*bad\.json'),
        ([run, out, '--checkpoint', tmp_path / 'none.pth'], r"none\.pth'"),
    ):
        refused(named, publish, [str(argument) for argument in arguments], error=SystemExit)
    assert not out.exists() and sorted(path.name for path in full.iterdir()) == ['mine']


def test_images_without_labels_are_classified(trained, tmp_path, capsys):
    config, checkpoint = str(trained / 'tiny.py'), str(trained / 'epoch_1.pth')
    settings, out = load_config(config), tmp_path / 'out'
    source = digits('test', settings.test_dataloader.dataset.transform)
    (tmp_path / 'in').mkdir()
    files = [str(tmp_path / f'in/{i}.png') for i in range(3)]
    for i, file in enumerate(files):
        source.source[i][0].save(file)
    command = [config, checkpoint, str(tmp_path / 'in'), '--out-dir', str(out)]
    command += ['--topk', '2', '--device', 'cpu']
    predict(command)
    said, found = capsys.readouterr().out, json.loads((out / 'predictions.json').read_text())
    rows = csv.DictReader((out / 'predictions.csv').read_text().splitlines())
    assert found == [
        {**row, 'rank': int(row['rank']), 'probability': float(row['probability'])} for row in rows
    ]
    model = load_trained(settings, checkpoint, 'cpu')
    model.normalize_inputs({'test_dataloader.dataset': source})
    with torch.no_grad():  # what a test makes of the same images
        shares, places = model(torch.stack([source[i][0] for i in range(3)])).softmax(1).topk(2)
    assert [row['image'] for row in found] == [file for file in files for _ in range(2)]
    assert all(file in said for file in files)
    assert [row['class'] for row in found] == [str(place) for place in places.flatten().tolist()]
    probabilities = torch.tensor([row['probability'] for row in found])
    torch.testing.assert_close(probabilities, shares.flatten())
    for flag, value in (('--topk', '11'), ('--opacity', '0.5')):
        refused(f'^error: {flag}=', predict, [*command, flag, value], error=SystemExit)
    for given in ([config, 'none', *files], [config, checkpoint, 'none']):
        refused('none', predict, given, error=SystemExit)
    Path(files[2]).write_bytes(b'no image')  # of which the others are not lost
    refused('2\\.png', predict, command, error=SystemExit)
    assert json.loads((out / 'predictions.json').read_text()) == found[:4]


def test_names_of_classes_and_files_steer_no_terminal_and_no_spreadsheet(trained, tmp_path, capfd):
    checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
    checkpoint['meta']['dataset_meta'] = {
        'classes': ['\x1b[31m', '=1+1', '+2', '-3', '@4', *'56789']
    }
    torch.save(checkpoint, tmp_path / 'a.pth')
    image = tmp_path / os.fsdecode(b'caf\xe9.png')  # Latin-1, which is no UTF-8
    Image.new('RGB', (28, 28)).save(image)
    command = [str(trained / 'tiny.py'), str(tmp_path / 'a.pth'), str(image), '--topk', '10']
    predict([*command, '--out-dir', str(tmp_path), '--device', 'cpu'])
    output = capfd.readouterr().out
    assert '\x1b' not in output and '\\x1b[31m ' in output and 'caf\\udce9.png: ' in output
    rows = [*csv.DictReader((tmp_path / 'predictions.csv').read_text().splitlines())]
    names = {'\\x1b[31m', "'=1+1", "'+2", "'-3", "'@4", *'56789'}
    assert {row['class'] for row in rows} == names and 'caf\\udce9' in rows[9]['image']
    exact = json.loads((tmp_path / 'predictions.json').read_text())
    assert exact[9]['image'] == str(image) and {row['class'] for row in exact} >= {
        '\x1b[31m',
        '=1+1',
    }
