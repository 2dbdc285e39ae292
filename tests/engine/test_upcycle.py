"""tools/upcycle.py: a dense file becomes the folder of a model with experts."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

from vqmoe_vision.engine.publish import upcycle

SIZES = dict(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=5)
MOE = dict(moe_layers='last1', num_experts=2, renormalize=True)
NUMBERS = ['pretrained_cfg_overlay.mean=[0.4,0.5,0.6]', 'pretrained_cfg_overlay.std=[0.2,0.3,0.4]']
OPTIONS = [f'{name}={value}' for name, value in {**SIZES, **MOE}.items()]


@pytest.fixture
def dense(tmp_path: Path) -> str:
    model = timm.create_model('vit_tiny_patch16_224', **SIZES)
    torch.save(model.state_dict(), tmp_path / 'dense.pth')
    return str(tmp_path / 'dense.pth')


def test_the_folder_is_what_create_model_makes(dense: str, tmp_path: Path, capsys) -> None:
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
def test_classes_are_named_as_long_as_the_head_is_kept(classes: int, tmp_path: Path) -> None:
    names = ['ant', 'bee', 'cat', 'dog', 'elk']
    config = {'label_names': names, 'license': 'mit', 'mean': [0.5] * 3, 'std': [0.5] * 3}
    model = timm.create_model('vit_tiny_patch16_224', pretrained_cfg_overlay=config, **SIZES)
    save_for_hf(model, tmp_path / 'dense', {'label_names': names}, SIZES, safe_serialization=True)
    # sizes are those of the folder
    options = [f'{name}={value}' for name, value in MOE.items()]
    options += [] if classes == 5 else [f'num_classes={classes}']
    out = tmp_path / 'out'
    source = f'local-dir:{tmp_path / "dense"}'
    upcycle([source, 'vit_tiny_smoe', str(out), '--cfg-options', *options])
    found = json.loads((out / 'config.json').read_text())
    assert found.get('label_names') == (names if classes == 5 else None)
    assert found['pretrained_cfg']['license'] == 'mit'


@pytest.mark.parametrize(('channels', 'numbers'), [(1, 1), (4, 1), (4, 4)])
def test_images_of_other_channels(dense: str, tmp_path: Path, channels: int, numbers: int) -> None:
    out = tmp_path / 'folder'
    overlay = [f'pretrained_cfg_overlay.{name}={[0.25] * numbers}' for name in ('mean', 'std')]
    options = [*OPTIONS, f'in_chans={channels}']
    upcycle([dense, 'vit_tiny_smoe', str(out), '--cfg-options', *options, *overlay])
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    assert model(torch.randn(2, channels, 32, 32)).shape == (2, 5)
    config = json.loads((out / 'config.json').read_text())['pretrained_cfg']
    assert config['mean'] == config['std'] == [0.25] * channels


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['DENSE', 'vit_tiny_smoe', 'OUT', '--cfg-options', *OPTIONS], 'how images were normalis'),
        (['DENSE', 'vit_tiny_smoe', 'OUT', '--cfg-options', *NUMBERS], 'shapes: '),
        (
            ['DENSE', 'vit_tiny_smoe', 'OUT', '--cfg-options', *OPTIONS, *NUMBERS, 'in_chans=4'],
            'mean=',
        ),
        (['DENSE', 'vit_tiny_smoe', '.', '--cfg-options', *OPTIONS], 'out='),
        (['DENSE', 'vit_tiny_patch16_224', 'OUT'], 'model='),
        (['NONE.pth', 'vit_tiny_smoe', 'OUT'], 'NONE.pth'),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(
    dense: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {'DENSE': dense, 'OUT': str(tmp_path / 'OUT')}
    with pytest.raises(SystemExit, match=message) as caught:
        upcycle([places.get(argument, argument) for argument in arguments])
    assert '\n' not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['dense.pth']
