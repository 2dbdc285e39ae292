"""tools/export.py on what users have: a config, a work dir, a timm name, a published folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from vqmoe_vision.engine.export import export
from vqmoe_vision.engine.hub_folder import publish_folder
from vqmoe_vision.models.create import create_model, create_saved

from ..models.test_weight_files import flip
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


def test_the_best_checkpoint_of_several_is_for_the_user_to_choose(
    run: Path, tmp_path: Path
) -> None:
    for metric in 'ab':
        (tmp_path / f'best_{metric}.pth').touch()
    (tmp_path / 'run.py').write_text((run / 'run.py').read_text())
    said = r'has best_a\.pth, best_b\.pth: name one of them after the work dir$'
    with pytest.raises(SystemExit, match=said):
        export([str(tmp_path), str(tmp_path / 'run.pt2')])


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


def test_a_name_of_timm_with_a_file(weights: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / 'model.pt2'
    export([NAME, weights, str(out), '--batch', '1', '--cfg-options', *SMALL])
    assert '(1, 3, 32, 32)' in capsys.readouterr().out
    model = timm.create_model(NAME, depth=1, embed_dim=12, img_size=32, num_classes=5)
    timm.models.load_checkpoint(model, weights)
    images = torch.randn(1, 3, 32, 32)
    found = torch.export.load(out).module()(images)
    torch.testing.assert_close(found, model.eval()(images), rtol=1e-6, atol=1e-6)


def test_a_name_whose_weights_come_with_the_package(tmp_path: Path) -> None:
    out = tmp_path / 'model.pt2'
    export(['test_vit_vqmoe', str(out), '--batch', '2', '--cfg-options', 'form=discrete'])
    model = timm.create_model('test_vit_vqmoe', pretrained=True, form='discrete').eval()
    images = torch.randn(2, 3, 32, 32)
    found = torch.export.load(out).module()(images)
    torch.testing.assert_close(found, model(images), rtol=1e-5, atol=1e-5)
    assert about(out)['classes'][3] == 'cat'


SIZES = {'img_size': 32, 'num_classes': 5}
# of timm, ours with experts, one of timm's with experts, and one that is no vision transformer
MODELS: dict[str, tuple[str, dict | None, dict[str, Any]]] = {
    'dense': (NAME, None, {**SIZES, 'depth': 1, 'embed_dim': 12}),
    'ours': ('vit_tiny_smoe', {'moe_layers': [0]}, {**SIZES, 'depth': 1, 'embed_dim': 12}),
    'host': (NAME, {'method': 'smoe', 'moe_layers': [0]}, {**SIZES, 'depth': 1, 'embed_dim': 12}),
    'other': ('test_resnet', None, {'num_classes': 5}),
}


def leave_folder(path: Path, kind: str, safe: bool) -> Any:
    """A folder of timm; returns its model."""
    name, moe, options = MODELS[kind]
    model: Any = create_model(name, moe, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    args = model._model_args
    if kind == 'other':
        model.pretrained_cfg['input_size'] = (3, 32, 32)
    save_for_hf(model, path, model_args=args, safe_serialization=safe)
    return model


@pytest.mark.parametrize('kind', MODELS)
def test_a_folder_of_timm(kind: str, tmp_path: Path) -> None:
    model = leave_folder(tmp_path / 'L', kind, safe=True)
    export([f'local-dir:{tmp_path / "L"}', str(tmp_path / 'model.pt2'), '--batch', '2'])
    images = torch.randn(2, 3, 32, 32)
    found = torch.export.load(tmp_path / 'model.pt2').module()(images)
    torch.testing.assert_close(found, model(images), rtol=1e-5, atol=1e-5)


HARMS = {
    'bit': r"pytorch_model\.bin' is damaged: .* does not match its checksum",
    'cut': r"L(/model\.safetensors)?' is damaged, or holds more than weights",
    'config': r"^error: source='local-dir:.*L' is not possible: a folder with the config\.json",
    'classes': 'num_classes=10|weights of .*L. have nothing for (head.weight, head.bias|a head)',
    'heads': 'num_heads=3, the model has num_heads=4',
}
# of a network without heads
WRONG = [(kind, harm) for kind in MODELS for harm in HARMS if (kind, harm) != ('other', 'heads')]


@pytest.mark.parametrize(('kind', 'harm'), WRONG)
def test_what_is_wrong_with_a_folder_is_one_line(kind: str, harm: str, tmp_path: Path) -> None:
    folder, options = tmp_path / 'L', []
    model = leave_folder(folder, kind, safe=harm != 'bit')
    if harm == 'bit':
        first = next(value for name, value in model.state_dict().items() if value.numel() > 99)
        flip(folder / 'pytorch_model.bin', first)
    elif harm == 'cut':
        file = folder / 'model.safetensors'
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == 'config':
        (folder / 'config.json').unlink()
    else:
        options = ['--cfg-options', 'num_classes=7' if harm == 'classes' else 'num_heads=4']
    with pytest.raises(SystemExit, match=HARMS[harm]) as caught:
        export([f'local-dir:{folder}', str(tmp_path / 'OUT.pt2'), *options])
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.glob('OUT*'))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['num_classes=7'], "weights of 'NAME' have nothing for head.weight, head.bias, which wou"),
        (['upcycling.drop=0.5'], r'^error: upcycling.* has no dense MLP to make experts of'),
        (['num_heads=4'], 'num_heads=3, the model has num_heads=4'),
    ],
)
def test_options_that_weights_by_name_do_not_have(
    options: list[str], message: str, tmp_path: Path
) -> None:
    name = 'test_vit_vqmoe'
    with pytest.raises(SystemExit, match=message.replace('NAME', name)):
        export([name, str(tmp_path / 'OUT.pt2'), '--cfg-options', *options])


def test_a_head_that_timm_drops_in_silence_is_not_written(tmp_path: Path) -> None:
    name, out = 'test_resnet.r160_in1k', tmp_path / 'OUT.pt2'
    torch.save(timm.create_model(name).state_dict(), tmp_path / 'a.pth')
    given = ['--batch', '1', '--cfg-options', f'pretrained_cfg_overlay.file={tmp_path / "a.pth"}']
    with pytest.raises(SystemExit, match=f"weights of '{name}' have nothing for a head of 7 class"):
        export([name, str(out), *given, 'num_classes=7'])
    assert not out.exists()
    export([name, str(out), *given, 'num_classes=0'])  # its features
    assert out.exists()


def test_a_file_is_compared_with_what_is_beside_it(tmp_path: Path) -> None:
    model = leave_folder(tmp_path / 'L', 'dense', safe=True)
    file, out = str(tmp_path / 'L/model.safetensors'), str(tmp_path / 'OUT.pt2')
    options = ['--batch', '2', '--cfg-options', *SMALL]
    with pytest.raises(SystemExit, match='num_heads=3, the model has num_heads=6'):
        export([NAME, file, out, *options, 'num_heads=6'])
    export([NAME, file, out, *options])
    images = torch.randn(2, 3, 32, 32)
    found = torch.export.load(out).module()(images)
    torch.testing.assert_close(found, model(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(SystemExit, match=r'have nothing for .*router.* which would be random'):
        export([NAME, file, out, *options, 'moe.method=smoe', 'moe.moe_layers=[0]'])


def test_what_timm_itself_makes_of_the_weights_of_a_folder(tmp_path: Path) -> None:
    model = leave_folder(tmp_path / 'L', 'other', safe=False)
    source, images = f'local-dir:{tmp_path / "L"}', torch.randn(2, 3, 32, 32)
    out = tmp_path / 'model.pt2'
    arguments = [source, str(out), '--batch', '2', '--cfg-options']
    export([*arguments, 'num_classes=0'])
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    found = torch.export.load(out).module()(images)
    torch.testing.assert_close(found, features, rtol=1e-5, atol=1e-5)
    export([*arguments, 'in_chans=1'])
    gray = images[:, :1]
    found = torch.export.load(out).module()(gray)
    torch.testing.assert_close(found, model(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    several: Any = create_saved(source, features_only=True, out_indices=[4])
    torch.testing.assert_close(several.eval()(images)[0], model.forward_features(images))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            ['num_classes=0', 'layers=[1,1,1,2]'],
            r'^error: checkpoint .* does not fit the mo',
        ),
        (
            ['features_only=True', 'layers=[1,1,1]'],
            r'^error: checkpoint .* does not fit th',
        ),
        (['in_chans=1', 'pretrained_cfg_overlay.first_conv='], 'size mismatch for conv1'),
        (['features_only=True'], r'^error: features_only=True .* a timm model that gives logits'),
        (['pretrained_cfg_overlay.file=a.pth'], r'a\.pth'),
        (['moe.moe_layers=[0]'], 'moe'),
    ],
    ids=str,
)
def test_nothing_of_a_folder_is_random(options: list[str], message: str, tmp_path: Path) -> None:
    leave_folder(tmp_path / 'L', 'other', safe=False)
    with pytest.raises(SystemExit, match=message) as caught:
        export(
            [f'local-dir:{tmp_path / "L"}', str(tmp_path / 'OUT.pt2'), '--cfg-options', *options]
        )
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.glob('OUT*'))


def test_a_folder_in_the_place_of_a_file(tmp_path: Path, caplog) -> None:
    model = leave_folder(tmp_path / 'L', 'dense', safe=True)
    out = tmp_path / 'OUT.pt2'
    arguments = [NAME, str(tmp_path / 'L'), str(out), '--batch', '1', '--cfg-options', *SMALL]
    with pytest.raises(SystemExit, match=r'have nothing for .*router.* which would be random'):
        export([*arguments, 'moe.method=smoe', 'moe.moe_layers=[0]'])
    export(arguments)
    images = torch.randn(1, 3, 32, 32)
    found = torch.export.load(out).module()(images)
    torch.testing.assert_close(found, model(images), rtol=1e-5, atol=1e-5)
    assert 'No checkpoint found' not in caplog.text


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['RUN', 'OUT.pb'], r"out='.*OUT\.pb' .*ends in \.onnx or \.pt2"),
        (['RUN', 'OUT.pt2', '--opset', '20'], '--opset=20 .*only for a file of ONNX'),
        (['RUN', 'OUT.pt2', '--batch', '0'], 'batch=0 .*at least 1'),
        (['RUN', 'OUT.pt2', '--size', '32', '32'], r'size=\(32, 32\) .*the size of its model'),
        (['RUN', '/proc/none/model.pt2'], 'folder /proc/none cannot be written'),
        (['RUN/run.py', 'OUT.pt2'], "source='.*run.py' .*a config with its checkpoint"),
        (['RUN/run.py', 'WEIGHTS', 'OUT.pt2'], 'does not fit the config: .*missing'),
        ([NAME, 'WEIGHTS', 'OUT.pt2'], 'does not fit the model: .*such as num_classes=10'),
        (['vit_tiny_vqmoe', 'OUT.pt2'], 'checkpoint=None .*a file of weights'),
        (['local-dir:RUN', 'WEIGHTS', 'OUT.pt2'], 'checkpoint=.*has its weights'),
        (['local-dir:RUN', 'OUT.pt2', *CHANGED, 'pretrained=True'], '^error: pretrained=True is'),
        (
            ['local-dir:RUN', 'OUT.pt2', *CHANGED, 'pretrained_cfg.std=1'],
            r'^error: pretrained_cfg=\{',
        ),
        ([NAME, 'WEIGHTS', 'OUT.pt2', *CHANGED, 'checkpoint_path=x'], '^error: checkpoint_path='),
        ([NAME, 'WEIGHTS', 'OUT.pt2', *CHANGED, 'model_name=x'], '^error: model_name=.*left out'),
        (['test_vit_vqmoe', 'OUT.pt2', *CHANGED, 'pretrained=False'], '^error: pretrained=False'),
        (['no_such_model', 'WEIGHTS', 'OUT.pt2'], 'no_such_model'),
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
