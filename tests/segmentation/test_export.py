"""A segmentor as a graph: the label maps of mmseg's own test."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from mmseg.structures import SegDataSample
from PIL import Image
from torch import Tensor

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.publish import publish
from vqmoe_vision.models.export import differences, export_onnx, load_exported
from vqmoe_vision.segmentation import TimmViT
from vqmoe_vision.segmentation.segmentor import SegmentorGraph

from .. import cases, needs_onnx, refused
from ..classification.test_travel import CODE, equal
from ..rows import ROWS, row_options
from ..runs import NORMALIZATION, leave_run
from .conftest import PREPROCESSOR, tiny_segmentor
from .test_cli import write_config

SLIDE = {'mode': 'slide', 'crop_size': (32, 32), 'stride': (16, 24)}


@torch.no_grad()
def from_mmseg(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels of a test of raw images, (B, 3, H, W) uint8 and BGR."""
    size = tuple(images.shape[2:])
    metainfo = dict(img_shape=size, ori_shape=size, pad_shape=size)
    samples = [SegDataSample(metainfo=metainfo) for _ in images]
    found = model.test_step(dict(inputs=list(images), data_samples=samples))
    logits = torch.stack([sample.seg_logits.data for sample in found])
    return logits, torch.stack([sample.pred_sem_seg.data[0] for sample in found])


def raw_and_normalised(batch: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    raw = torch.randint(256, (batch, 3, *size), dtype=torch.uint8)
    return raw, (raw.flip(1).float() - 127.5) / 127.5


@cases(
    'preprocessor, test_cfg, size',
    *(({'size_divisor': 8}, {'mode': 'whole'}, size) for size in ((32, 32), (37, 50))),
    *(({'size_divisor': 8}, SLIDE, size) for size in ((61, 70), (32, 32), (24, 70))),
    *(({'size_divisor': 16}, windows, (37, 50)) for windows in ({'mode': 'whole'}, SLIDE)),
    *(({'size': (40, 64)}, windows, (37, 50)) for windows in ({'mode': 'whole'}, SLIDE)),
    ids=str,
)
@torch.no_grad()
def test_the_graph_predicts_what_a_test_does(preprocessor, test_cfg, size):
    padded = dict(PREPROCESSOR, pad_val=2.0, test_cfg=preprocessor)
    model = tiny_segmentor(data_preprocessor=padded, test_cfg=test_cfg).eval()
    raw, images = raw_and_normalised(2, size)
    logits, labels = SegmentorGraph(model, size)(images)
    expected, expected_labels = from_mmseg(model, raw)
    # windows of all images are one batch here, and sums of windows in another order
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, expected_labels)
    for wrong in [(0, 32)] + [(41, 64), (40, 65)] * ('size' in preprocessor):
        refused(r'^size=', SegmentorGraph, model, wrong)


@torch.no_grad()
def test_the_graph_of_two_classes_has_their_threshold():
    head = dict(type='FCNHead', num_classes=2, out_channels=1, num_convs=0, concat_input=False)
    head |= dict(threshold=0.5, loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True))
    model = tiny_segmentor(decode_head=head).eval()
    raw, images = raw_and_normalised(2, (32, 32))
    labels = SegmentorGraph(model, (32, 32))(images)[1]
    expected = from_mmseg(model, raw)[1]
    assert 0 < expected.float().mean() < 1
    assert torch.equal(labels, expected)


def test_onnxruntime_gives_the_same_label_maps(tmp_path):
    needs_onnx()
    model = tiny_segmentor(backbone={'depth': 1, 'moe': {'moe_layers': [0]}}, test_cfg=SLIDE)
    model.train()
    exportable = model.exportable((40, 48))
    assert exportable.about == {'channels': 'RGB', 'mean': [0.5] * 3, 'std': [0.5] * 3}
    run = load_exported(export_onnx(exportable, tmp_path / 'model.onnx'), threads=1)
    assert model.training and model.backbone.training
    raw, images = raw_and_normalised(4, (40, 48))
    expected = from_mmseg(model.eval(), raw)[1]
    for batch in (1, 4):
        labels = run(images[:batch])[1]
        assert labels.dtype == torch.int64
        assert torch.equal(labels, expected[:batch])
    (logits, labels) = differences(exportable, run, (1,))
    assert logits.largest < 1e-5
    assert str(labels) == 'batch 1, labels: 0 of 1920 differ'


SMALL: dict[str, Any] = dict(img_size=(32, 48), patch_size=8, depth=4, embed_dim=12, num_heads=3)
OPTIONS = {f'model.backbone.{name}': value for name, value in SMALL.items()}


def published(folder: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    """The model of a run, and the timm model of the folder that is made of it."""
    config = write_config(folder, 'travel')
    run = leave_run(folder / 'run', config, {**OPTIONS, **options}, 'ab')
    publish([str(folder / 'run'), str(folder / 'out')])
    return run, timm.create_model(f'local-dir:{folder / "out"}', pretrained=True).eval()


@pytest.mark.parametrize('row', ROWS)
def test_every_row_of_a_comparison(row, tmp_path):
    run, model = published(tmp_path, row_options(row, model='model.backbone'))
    images = torch.randn(2, 3, 40, 24)  # of another size than the model's
    (expected,) = run.backbone(images)
    found = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    equal(found[0], expected)
    assert model.num_classes == 0
    assert model.pretrained_cfg['mean'] == pytest.approx(NORMALIZATION.mean)
    assert tuple(model.pretrained_cfg['input_size']) == (3, 32, 48)
    backbone = load_config(str(tmp_path / 'run/run.py')).model.backbone
    file = str(tmp_path / 'out/model.safetensors')
    again = TimmViT(**{**backbone, 'type': None, 'checkpoint': file})
    again.init_weights()
    assert again.weights_normalization is not None
    assert not again.weights_normalization.differing(NORMALIZATION)
    for name, value in again.model.named_parameters():
        equal(value, run.backbone.model.get_parameter(name))


def test_what_the_card_says_is_run(tmp_path, monkeypatch, capsys):
    published(tmp_path, {})
    card = ModelCard.load(tmp_path / 'out/README.md')
    assert card.data.pipeline_tag == 'image-feature-extraction'
    Image.new('RGB', (70, 60)).save(tmp_path / 'out/image.png')
    monkeypatch.chdir(tmp_path / 'out')
    (code,) = CODE.findall(card.text)
    capsys.readouterr()
    exec(compile(code, 'card', 'exec'), {})
    assert capsys.readouterr().out == 'torch.Size([1, 12, 4, 6])\n'
