"""tools/export.py on what users have: a config, a work dir, a timm name, a published folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from vqmoe_vision.engine.publish import export, publish_folder

from ..runs import NORMALIZATION, leave_run

CONFIG = 'configs/classification/digits/demo/vit_tiny_vqmoe_demo.py'
OPTIONS = {
    'model.depth': 1,
    'model.embed_dim': 12,
    'model.moe.num_experts': 2,
    'model.moe.moe_layers': [0],
}
NAME = 'vit_tiny_patch16_224'
CHANGED = ['--cfg-options']
SMALL = ['depth=1', 'embed_dim=12', 'img_size=32', 'num_classes=5']


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work dir of a classifier of digits."""
    folder = tmp_path_factory.mktemp('run') / 'run'
    leave_run(folder, CONFIG, OPTIONS, '0123456789')
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A timm model's own file."""
    model = timm.create_model(NAME, depth=1, embed_dim=12, img_size=32, num_classes=5)
    save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    return str(tmp_path / 'weights.safetensors')


def about(file: Path) -> dict[str, Any]:
    extra = {'about.json': ''}
    torch.export.load(file, extra_files=extra)
    return json.loads(extra['about.json'])


@pytest.mark.parametrize('suffix', ['.pt2', pytest.param('.onnx', marks=pytest.mark.long)])
def test_a_config_with_its_checkpoint(run: Path, tmp_path: Path, capsys, suffix: str) -> None:
    if suffix == '.onnx':
        for name in ('onnx', 'onnxscript', 'onnxruntime'):
            pytest.importorskip(name)
    out = tmp_path / 'new' / f'model{suffix}'
    export([str(run / 'run.py'), str(run / 'epoch_1.pth'), str(out)])
    written, *compared = capsys.readouterr().out.splitlines()
    assert written == f'wrote {out}: images (B, 3, 48, 48) float32 to logits'
    begins = [line.partition(', largest')[0] for line in compared]
    assert begins == [f'batch {n}, logits: {n} of {n} predictions equal' for n in (1, 4)]
    assert all(float(line.split()[-1]) < 1e-5 for line in compared)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_work_dir_and_what_is_published_of_it(run: Path, tmp_path: Path) -> None:
    export([str(run), str(tmp_path / 'run.pt2'), '--batch', '2'])
    publish_folder(str(run), str(tmp_path / 'published'))
    export([f'local-dir:{tmp_path / "published"}', str(tmp_path / 'folder.pt2'), '--batch', '2'])
    images = torch.randn(2, 3, 48, 48)
    one, two = (
        torch.export.load(tmp_path / name).module()(images) for name in ('run.pt2', 'folder.pt2')
    )
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    for name in ('run.pt2', 'folder.pt2'):
        assert about(tmp_path / name)['classes'] == list('0123456789')
    assert about(tmp_path / 'run.pt2')['std'] == pytest.approx(NORMALIZATION.std)
    assert about(tmp_path / 'folder.pt2')['std'] == pytest.approx(NORMALIZATION.std)


# of timm, ours with experts, one of timm's with experts, and one that is no vision transformer


def test_a_head_that_timm_drops_in_silence_is_not_written(tmp_path: Path) -> None:
    name, out = 'test_resnet.r160_in1k', tmp_path / 'OUT.pt2'
    torch.save(timm.create_model(name).state_dict(), tmp_path / 'a.pth')
    given = ['--batch', '1', '--cfg-options', f'pretrained_cfg_overlay.file={tmp_path / "a.pth"}']
    with pytest.raises(SystemExit, match=f"weights of '{name}' have nothing for a head of 7 class"):
        export([name, str(out), *given, 'num_classes=7'])
    assert not out.exists()
    export([name, str(out), *given, 'num_classes=0'])  # its features
    assert out.exists()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['RUN', 'OUT.pb'], '^error: out='),
        (['RUN', 'OUT.pt2', '--opset', '20'], '^error: --opset=20'),
        (['RUN', 'OUT.pt2', '--size', '32', '32'], r'size=\(32, 32\)'),
        (['RUN/run.py', 'OUT.pt2'], '^error: source='),
        (['RUN/run.py', 'WEIGHTS', 'OUT.pt2'], 'does not fit the config: .*missing'),
        ([NAME, 'WEIGHTS', 'OUT.pt2'], 'does not fit the model'),
        (['vit_tiny_vqmoe', 'OUT.pt2'], '^error: checkpoint=None'),
        (['local-dir:RUN', 'WEIGHTS', 'OUT.pt2'], '^error: checkpoint='),
        (
            [NAME, 'WEIGHTS', 'OUT.pt2', *CHANGED, 'checkpoint_path=x'],
            "multiple values .* 'checkpoint_path'",
        ),
        # what would be random in the file
        (['test_vit_vqmoe', 'OUT.pt2', *CHANGED, 'num_classes=7'], 'have nothing for head.weight'),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(
    run: Path, weights: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {'RUN': str(run), 'WEIGHTS': weights, 'OUT': str(tmp_path / 'OUT')}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    with pytest.raises(SystemExit, match=message) as caught:
        export(arguments)
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.glob('OUT*'))
