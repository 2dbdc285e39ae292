import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.logging import HistoryBuffer
from timm.models import save_for_hf

from vqmoe_vision.engine.checkpoint import read_state
from vqmoe_vision.engine.publish import (
    export,
    publish,
    publish_checkpoint,
    publish_folder,
    upcycle,
    without_folders,
)
from vqmoe_vision.models.compat import STATED
from vqmoe_vision.models.weights import network_of

from .. import cases, needs_onnx, refused
from ..runs import NORMALIZATION, leave_run


def write(path: Path) -> str:
    cfg = "model = dict()\nload_from = '/home/me/a.pth'\n"
    meta: Any = {'cfg': cfg, 'iter': 2, 'dataset_meta': {'classes': 'ab'}}
    meta[STATED] = {'img_size': [32, 48]}
    meta['hook_msgs'] = {'last_ckpt': '/home/me/iter_2.pth'}
    weights, hub = {'w': torch.ones(2)}, {'log': HistoryBuffer([1.0], [1])}
    content = {'state_dict': weights, 'meta': meta, 'message_hub': hub}
    more = {'optimizer': {'state': {0: torch.ones(2)}}, 'param_schedulers': [{'last_step': 2}]}
    torch.save(content | more, path)
    return str(path)


def test_weights_config_and_classes_are_kept(tmp_path, capsys):
    publish([write(tmp_path / 'iter_2.pth'), str(tmp_path / 'out/scenes.pth')])
    (file,) = (tmp_path / 'out').iterdir()
    digits = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    assert file.name == f'scenes-{digits}.pth'
    assert capsys.readouterr().out == f'wrote {file}\n'
    content = torch.load(file, weights_only=True)
    assert content.keys() == {'state_dict', 'meta'}
    assert content['meta'].keys() == {'cfg', STATED, 'dataset_meta', 'iter'}
    assert content['meta']['cfg'] == "model = dict()\nload_from = 'a.pth'\n"
    assert read_state(str(file))['w'].tolist() == [1, 1]
    network = network_of(str(file))
    assert network is not None and network.img_size == (32, 48)
    assert torch.serialization.get_unsafe_globals_in_checkpoint(file) == []


def test_a_mask_is_infinite_by_design(tmp_path):
    file, mask = tmp_path / 'iter_2.pth', torch.tensor([0.0, -torch.inf])
    content = torch.load(write(file), weights_only=True)
    torch.save({**content, 'state_dict': {'mask': mask}}, file)
    assert torch.equal(read_state(str(publish_checkpoint(str(file), str(file))))['mask'], mask)


SIZES = dict(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=5)
MOE = dict(moe_layers='last1', num_experts=2, renormalize=True)
NUMBERS = ['pretrained_cfg_overlay.mean=[0.4,0.5,0.6]', 'pretrained_cfg_overlay.std=[0.2,0.3,0.4]']
OPTIONS = [f'{name}={value}' for name, value in {**SIZES, **MOE}.items()]


@pytest.fixture
def dense(tmp_path) -> str:
    model = timm.create_model('vit_tiny_patch16_224', **SIZES)
    torch.save(model.state_dict(), tmp_path / 'dense.pth')
    return str(tmp_path / 'dense.pth')


def test_the_folder_is_what_create_model_makes(dense, tmp_path, capsys):
    out = tmp_path / 'new' / 'folder'
    command = [dense, 'vit_tiny_smoe', str(out), '--seed', '3', '--cfg-options', *OPTIONS, *NUMBERS]
    upcycle([*command, 'upcycling.noise=0.1'])
    torch.manual_seed(3)
    how = dict(upcycle=dense, upcycling=dict(noise=0.1))
    expected = timm.create_model('vit_tiny_smoe', **how, **SIZES, **MOE)
    found = timm.create_model(f'local-dir:{out}', pretrained=True)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    config = json.loads((out / 'config.json').read_text())['pretrained_cfg']
    kept = {name: config[name] for name in ('mean', 'std', 'input_size')}
    assert kept == dict(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], input_size=[3, 32, 32])
    report, _, each = (out / 'upcycling.txt').read_text().partition('\n\n')
    assert 'made of dense MLPs: blocks.1.mlp.experts.fc1.weight' in report
    assert capsys.readouterr().out.endswith(f'{report}\nwrote {out}\n')
    lines = each.splitlines()
    assert {line.partition(': ')[0] for line in lines} == expected.state_dict().keys()
    assert 'cls_token: loaded' in lines and len(lines) == len(expected.state_dict())
    assert 'blocks.1.mlp.experts.fc1.bias: made of blocks.1.mlp.fc1.bias' in lines
    assert 'blocks.1.mlp.router.weight: as initialised' in lines


@pytest.mark.parametrize('classes', [5, 4])
def test_classes_are_named_as_long_as_the_head_is_kept(classes, tmp_path):
    names = ['ant', 'bee', 'cat', 'dog', 'elk']
    config = {'label_names': names, 'license': 'mit', 'mean': [0.5] * 3, 'std': [0.5] * 3}
    model = timm.create_model('vit_tiny_patch16_224', pretrained_cfg_overlay=config, **SIZES)
    save_for_hf(model, tmp_path / 'dense', {'label_names': names}, SIZES, safe_serialization=True)
    options = [f'{name}={value}' for name, value in MOE.items()]
    options += [] if classes == 5 else [f'num_classes={classes}']
    source, out = f'local-dir:{tmp_path / "dense"}', tmp_path / 'out'
    upcycle([source, 'vit_tiny_smoe', str(out), '--cfg-options', *options])
    found = json.loads((out / 'config.json').read_text())
    assert found.get('label_names') == (names if classes == 5 else None)
    assert found['pretrained_cfg']['license'] == 'mit'


@pytest.mark.parametrize('channels, numbers', [(1, 1), (4, 1), (4, 4)])
def test_images_of_other_channels(dense, tmp_path, channels, numbers):
    out = tmp_path / 'folder'
    overlay = [f'pretrained_cfg_overlay.{name}={[0.25] * numbers}' for name in ('mean', 'std')]
    options = [*OPTIONS, f'in_chans={channels}']
    upcycle([dense, 'vit_tiny_smoe', str(out), '--cfg-options', *options, *overlay])
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    assert model(torch.randn(2, channels, 32, 32)).shape == (2, 5)
    config = json.loads((out / 'config.json').read_text())['pretrained_cfg']
    assert config['mean'] == config['std'] == [0.25] * channels


CONFIG = 'configs/classification/digits/demo/vit_tiny_vqmoe_demo.py'
OF_RUN = {'model.depth': 1, 'model.embed_dim': 12}
OF_RUN |= {'model.moe.num_experts': 2, 'model.moe.moe_layers': [0]}


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('run') / 'run'
    leave_run(folder, CONFIG, OF_RUN, '0123456789')
    return folder


@pytest.mark.parametrize('suffix', ['.pt2', pytest.param('.onnx', marks=pytest.mark.long)])
def test_a_config_with_its_checkpoint(run, tmp_path, capsys, suffix):
    if suffix == '.onnx':
        needs_onnx()
    out = tmp_path / 'new' / f'model{suffix}'
    export([str(run / 'run.py'), str(run / 'epoch_1.pth'), str(out)])
    written, *compared = capsys.readouterr().out.splitlines()
    assert written == f'wrote {out}: images (B, 3, 48, 48) float32 to logits'
    begins = [line.partition(', largest')[0] for line in compared]
    assert begins == [f'batch {n}, logits: {n} of {n} predictions equal' for n in (1, 4)]
    assert all(float(line.split()[-1]) < 1e-5 for line in compared)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_work_dir_and_what_is_published_of_it(run, tmp_path):
    export([str(run), str(tmp_path / 'run.pt2'), '--batch', '2'])
    publish_folder(str(run), str(tmp_path / 'published'))
    export([f'local-dir:{tmp_path / "published"}', str(tmp_path / 'folder.pt2'), '--batch', '2'])
    images = torch.randn(2, 3, 48, 48)
    one, two = (torch.export.load(tmp_path / n).module()(images) for n in ('run.pt2', 'folder.pt2'))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    for name in ('run.pt2', 'folder.pt2'):
        torch.export.load(tmp_path / name, extra_files=(extra := {'about.json': ''}))
        about = json.loads(extra['about.json'])
        assert about['classes'] == list('0123456789')
        assert about['std'] == pytest.approx(NORMALIZATION.std)


@cases(
    'text, expected',
    ("'/data/mine/'", "'mine'"),
    ('"~me/data"', '"data"'),
    ("'local-dir:/home/me/vit'", "'local-dir:vit'"),
    ("['/a/b', 'c/d', '/', '../e']", "['b', 'c/d', '/', '../e']"),
    (r"'/a/it\'s'", r"'it\'s'"),
    ("'https://a.org/b'", "'https://a.org/b'"),
)
def test_of_paths_the_names_are_published(text, expected):
    assert without_folders(f'a = {text}\n') == f'a = {expected}\n'


def test_a_card_takes_no_markup_and_a_config_no_folders_of_a_checkpoint(tmp_path):
    home = {'load_from': '/home/me/start.pth', 'test_dataloader.dataset.data_root': '/home/me/data'}
    leave_run(tmp_path / 'run', CONFIG, OF_RUN | home, '0123456789')
    checkpoint = torch.load(tmp_path / 'run/epoch_1.pth', weights_only=False)
    tag = '<img src=x>|`\n# A'
    checkpoint['message_hub'] = {'log_scalars': {f'val/{tag}': HistoryBuffer([1.0], [1])}}
    checkpoint['meta'] |= {'seed': tag, 'epoch': tag}
    torch.save({**checkpoint, 'run_record': {'commits': [tag]}}, tmp_path / 'run/best_a.pth')
    out = publish_folder(str(tmp_path / 'run'), str(tmp_path / 'published'))
    card = (out / 'README.md').read_text()
    assert '<img' not in card and card.count('&lt;img src=x&gt;&#124;&#96;&#92;n# A') == 4
    assert "load_from='start.pth'" in (out / 'run.py').read_text()
    assert all(b'/home/me' not in path.read_bytes() for path in out.iterdir())


def test_a_head_that_timm_drops_in_silence_is_not_written(tmp_path):
    name, out = 'test_resnet.r160_in1k', tmp_path / 'OUT.pt2'
    torch.save(timm.create_model(name).state_dict(), tmp_path / 'a.pth')
    given = ['--batch', '1', '--cfg-options', f'pretrained_cfg_overlay.file={tmp_path / "a.pth"}']
    with pytest.raises(SystemExit, match=f"weights of '{name}' have nothing for a head of 7 class"):
        export([name, str(out), *given, 'num_classes=7'])
    assert not out.exists()
    export([name, str(out), *given, 'num_classes=0'])  # its features
    assert out.exists()


UPCYCLE = 'DENSE vit_tiny_smoe OUT --cfg-options'
SIZED = f'{UPCYCLE} {" ".join(OPTIONS)}'


@cases(
    'tool, command, message',
    (publish, 'none.pth OUT.pth', '^error: source='),
    (publish, 'GOOD OUT.pt', '^error: out='),
    (publish, 'RUN OUT.pth', '^error: out='),
    (publish, 'GOOD OUT.pth --license mit', "^error: --license='mit'"),
    (publish, 'DENSE OUT.pth', '^error: checkpoint='),
    (publish, 'DAMAGED OUT.pth', r"damaged\.pth' is damaged"),
    (upcycle, SIZED, 'how images were normalis'),
    (upcycle, f'{UPCYCLE} {" ".join(NUMBERS)}', 'shapes: '),
    (upcycle, f'{SIZED} {" ".join(NUMBERS)} in_chans=4', 'mean='),
    (upcycle, SIZED.replace('OUT', '.'), 'out='),
    (upcycle, 'DENSE vit_tiny_patch16_224 OUT', 'model='),
    (upcycle, 'none.pth vit_tiny_smoe OUT', 'none.pth'),
    (export, 'RUN OUT.pb', '^error: out='),
    (export, 'RUN OUT.pt2 --opset 20', '^error: --opset=20'),
    (export, 'RUN OUT.pt2 --size 32 32', r'size=\(32, 32\)'),
    (export, 'RUN/run.py OUT.pt2', '^error: source='),
    (export, 'RUN/run.py DENSE OUT.pt2', 'does not fit the config: .*missing'),
    (export, 'vit_tiny_patch16_224 DENSE OUT.pt2', 'does not fit the model'),
    (export, 'vit_tiny_vqmoe OUT.pt2', '^error: checkpoint=None'),
    (export, 'local-dir:RUN DENSE OUT.pt2', '^error: checkpoint='),
    (export, 'test_vit_vqmoe OUT.pt2 --cfg-options num_classes=7', 'have nothing for head.weight'),
)
def test_a_mistake_is_one_line_and_leaves_nothing(tool, command, message, run, dense, tmp_path):
    damaged, good = tmp_path / 'damaged.pth', write(tmp_path / 'good.pth')
    damaged.write_bytes(b'no checkpoint')
    before = {*tmp_path.iterdir()}
    places = {'RUN': run, 'DENSE': dense, 'GOOD': good, 'DAMAGED': damaged, 'OUT': tmp_path / 'OUT'}
    for name, place in places.items():
        command = command.replace(name, str(place))
    refused(message, tool, command.split(), error=SystemExit)
    assert {*tmp_path.iterdir()} == before
