"""A segmentor as a graph: the label maps of mmseg's own test."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mmseg.structures import SegDataSample
from torch import Tensor

from vqmoe_vision.contrib.int8 import experts_as_linear, quantize_int8
from vqmoe_vision.models.export import differences, export_onnx, load_exported
from vqmoe_vision.moe import moe_layers
from vqmoe_vision.segmentation.export import SegmentorGraph

from .conftest import tiny_segmentor

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


@pytest.mark.parametrize(
    ('test_cfg', 'size'),
    [
        ({'mode': 'whole'}, (32, 32)),
        ({'mode': 'whole'}, (37, 50)),
        (SLIDE, (61, 70)),
        (SLIDE, (32, 32)),
        (SLIDE, (24, 70)),
    ],
    ids=str,
)
def test_the_graph_predicts_what_a_test_does(test_cfg: dict, size: tuple[int, int]) -> None:
    model = tiny_segmentor(test_cfg=test_cfg).eval()
    raw, images = raw_and_normalised(2, size)
    with torch.no_grad():
        logits, labels = SegmentorGraph(model, size)(images)
    expected, expected_labels = from_mmseg(model, raw)
    # windows of all images are one batch here, and sums of windows in another order
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, expected_labels)


def padding(**test_cfg: Any) -> dict[str, Any]:
    """A data preprocessor that pads images of a test with 2."""
    return dict(
        type='CheckedPreProcessor', mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True, pad_val=2.0,
        size=(32, 32), test_cfg=test_cfg,
    )  # fmt: skip


@pytest.mark.parametrize('test_cfg', [{'size_divisor': 16}, {'size': (40, 64)}], ids=str)
@pytest.mark.parametrize('windows', [{'mode': 'whole'}, SLIDE], ids=str)
def test_the_graph_pads_as_a_test_does(test_cfg: dict, windows: dict) -> None:
    model = tiny_segmentor(data_preprocessor=padding(**test_cfg), test_cfg=windows).eval()
    raw, images = raw_and_normalised(2, (37, 50))
    with torch.no_grad():
        logits, labels = SegmentorGraph(model, (37, 50))(images)
    expected, expected_labels = from_mmseg(model, raw)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize('size', [(41, 64), (40, 65)])
def test_images_larger_than_what_a_test_pads_to(size: tuple[int, int]) -> None:
    model = tiny_segmentor(data_preprocessor=padding(size=(40, 64)))
    with pytest.raises(ValueError, match=r'possible: at most \(40, 64\), to which tests pad'):
        SegmentorGraph(model, size)


@pytest.mark.parametrize('classes', [1])
def test_the_graph_of_two_classes_has_their_threshold(classes: int) -> None:
    head = dict(
        type='FCNHead', in_channels=12, channels=12, num_classes=2, out_channels=classes,
        num_convs=0, concat_input=False, threshold=0.5, norm_cfg=None,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True),
    )  # fmt: skip
    model = tiny_segmentor(decode_head=head).eval()
    raw, images = raw_and_normalised(2, (32, 32))
    with torch.no_grad():
        labels = SegmentorGraph(model, (32, 32))(images)[1]
    expected = from_mmseg(model, raw)[1]
    assert 0 < expected.float().mean() < 1
    assert torch.equal(labels, expected)


def test_onnxruntime_gives_the_same_label_maps(tmp_path: Path) -> None:
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(name)
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


def test_sizes_that_a_segmentor_does_not_take() -> None:
    model = tiny_segmentor()
    with pytest.raises(ValueError, match=r'size=\(0, 32\) .*two positive numbers'):
        model.exportable((0, 32))
    assert model.exportable().input_size == (3, 32, 32)
    assert tiny_segmentor(test_cfg={**SLIDE, 'crop_size': (24, 32)}).exportable().input_size == (
        3,
        24,
        32,
    )


def test_the_experts_of_a_segmentor_become_int8_with_the_rest() -> None:
    pytest.importorskip('torchao')
    model = tiny_segmentor(test_cfg=SLIDE).eval()
    raw, _ = raw_and_normalised(2, (32, 32))
    logits, _ = from_mmseg(model, raw)
    separate, _ = from_mmseg(experts_as_linear(model), raw)
    torch.testing.assert_close(separate, logits, rtol=1e-4, atol=1e-5)  # kernels of other sizes
    # a part can be int8 alone
    quantize_int8(model.backbone)
    layers = moe_layers(model).values()
    assert all(type(m.experts.fc1[0].weight).__name__ == 'Int8Tensor' for m in layers)
    assert type(model.decode_head.classes_proj.weight).__name__ == 'Parameter'
    found, _ = from_mmseg(quantize_int8(model), raw)
    assert type(model.decode_head.classes_proj.weight).__name__ == 'Int8Tensor'
    assert 0 < (found - logits).norm() < 0.2 * logits.norm()
