"""The backbone of a Segmenter as a folder that timm reads, with dense features."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.publish import publish
from vqmoe_vision.segmentation import TimmViT

from ..classification.test_travel import CODE, equal
from ..rows import ROWS, row_options
from ..runs import NORMALIZATION, leave_run
from .test_cli import write_config

SMALL: dict[str, Any] = dict(img_size=(32, 48), patch_size=8, depth=4, embed_dim=12, num_heads=3)
OPTIONS = {f'model.backbone.{name}': value for name, value in SMALL.items()}


def published(folder: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    """The model of a run, and the timm model of the folder that is made of it."""
    config = write_config(folder, 'travel')
    run = leave_run(folder / 'run', config, {**OPTIONS, **options}, 'ab')
    publish([str(folder / 'run'), str(folder / 'out')])
    return run, timm.create_model(f'local-dir:{folder / "out"}', pretrained=True).eval()


@pytest.mark.parametrize('row', ROWS)
def test_every_row_of_a_comparison(row: str, tmp_path: Path) -> None:
    run, model = published(tmp_path, row_options(row, model='model.backbone'))
    images = torch.randn(2, 3, 40, 24)  # of another size than the model's
    (expected,) = run.backbone(images)
    found = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    equal(found[0], expected)
    assert model.num_classes == 0
    assert model.pretrained_cfg['mean'] == pytest.approx(NORMALIZATION.mean)
    assert tuple(model.pretrained_cfg['input_size']) == (3, 32, 48)

    # and back: a backbone that starts from the file has the weights, and says what they want
    backbone = load_config(str(tmp_path / 'run/run.py')).model.backbone
    file = str(tmp_path / 'out/model.safetensors')
    again = TimmViT(**{**backbone, 'type': None, 'checkpoint': file})
    again.init_weights()
    assert again.weights_normalization is not None
    assert not again.weights_normalization.differing(NORMALIZATION)
    for name, value in again.model.named_parameters():
        equal(value, run.backbone.model.get_parameter(name))


@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('host', ['vit_tiny_patch16_224', 'vit_small_patch16_dinov3'])
def test_a_host_with_experts(host: str, norm: bool, tmp_path: Path) -> None:
    backbone = {'model_name': host, 'moe.method': 'vqmoe', 'out_indices': [2], 'norm': norm}
    options = {f'model.backbone.{key}': value for key, value in backbone.items()}
    run, model = published(tmp_path, options)
    images = torch.randn(1, 3, 40, 24)
    found = model.forward_intermediates(images, indices=[2], norm=True, intermediates_only=True)
    torch.testing.assert_close(found, list(run.backbone(images)), rtol=0, atol=0)
    assert model.method == 'vqmoe' and len(model.blocks) == 3


def test_what_the_card_says_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published(tmp_path, {})
    card = ModelCard.load(tmp_path / 'out/README.md')
    assert card.data.pipeline_tag == 'image-feature-extraction'
    Image.new('RGB', (70, 60)).save(tmp_path / 'out/image.png')
    monkeypatch.chdir(tmp_path / 'out')
    (code,) = CODE.findall(card.text)
    capsys.readouterr()
    exec(compile(code, 'card', 'exec'), {})
    assert capsys.readouterr().out == 'torch.Size([1, 12, 4, 6])\n'
