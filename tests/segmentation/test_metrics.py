"""mmseg's metrics, on which every reported number rests; what is changed inside it, and was."""

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.models.decode_heads import decode_head
from mmseg.models.losses import accuracy as theirs
from mmseg.registry import METRICS, MODELS
from mmseg.structures import SegDataSample
from sklearn.metrics import accuracy_score, jaccard_score, recall_score

from vqmoe_vision.segmentation import mmseg_patches
from vqmoe_vision.segmentation.mmseg_patches import accuracy

from .. import cases, refused

CLASSES = 5


@pytest.mark.parametrize('seed', range(3))
def test_metrics_are_those_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    # class 4 occurs in no image, class 3 in predictions only, and a fifth is ignored
    labels = rng.integers(0, 3, (3, 1, 7, 9))
    labels[rng.random(labels.shape) < 0.2] = 255
    said = rng.integers(0, 4, labels.shape)
    predicted = np.where(rng.random(labels.shape) < 0.6, np.minimum(labels, 3), said)
    metric = METRICS.build(dict(type='CheckedIoUMetric', iou_metrics=['mIoU']))
    metric.dataset_meta = {'classes': [str(i) for i in range(CLASSES)]}
    for ours, true in zip(torch.from_numpy(predicted), torch.from_numpy(labels), strict=True):
        metric.process({}, [{'pred_sem_seg': {'data': ours}, 'gt_sem_seg': {'data': true}}])
    known = labels != 255
    pair, found = (labels[known], predicted[known]), metric.evaluate(3)
    expected = {'aAcc': 100 * accuracy_score(*pair)}
    expected['mAcc'] = 100 * recall_score(*pair, labels=range(3), average='macro')
    expected['mIoU'] = 100 * jaccard_score(*pair, labels=range(4), average='macro')
    assert found == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_areas_are_mmsegs_and_allowed_on_a_gpu_that_is_to_be_deterministic(dtype, monkeypatch):
    # some beyond the classes, as of a data set with more of them
    predicted, labels = torch.randint(-1, CLASSES + 2, (2, 30, 40))
    labels[torch.rand(labels.shape) < 0.2] = 255
    predicted, labels = predicted.clamp(min=0).to(dtype), labels.to(dtype)  # a sigmoid's are floats
    expected = IoUMetric.intersect_and_union(predicted, labels, CLASSES, 255)
    monkeypatch.delattr(torch, 'histc')  # which raises there; `bincount` without weights does not
    found = METRICS.get('CheckedIoUMetric').intersect_and_union(predicted, labels, CLASSES, 255)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@cases(
    'named, given',
    ('iou_metric', {'iou_metric': 'mDice'}),
    ('iou_metrics', {'iou_metrics': ['mIou']}),
    ('output_dir', {'format_only': True}),
)
def test_options_that_the_metric_would_ignore_or_fail_on(named, given):
    refused(rf'^CheckedIoUMetric\.{named}=', METRICS.build, dict(type='CheckedIoUMetric', **given))


def test_images_without_label_maps_are_told_how_to_be_predicted():
    metric = METRICS.build(dict(type='CheckedIoUMetric'))
    metric.dataset_meta = {'classes': ('a', 'b')}
    refused(r'^CheckedIoUMetric\.format_only=False ', metric.process, {}, [{'pred_sem_seg': {}}])


@pytest.fixture(autouse=True)
def _patched() -> None:
    mmseg_patches.apply()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])  # the second has equal logits
@pytest.mark.parametrize('void', [0.0, 0.3, 1.0])
@pytest.mark.parametrize('ignored', [255, 1])  # which may be a class
def test_accuracy_is_mmsegs_to_the_bit(void, ignored, dtype):
    assert decode_head.accuracy is accuracy
    logits = torch.randn(3, 5, 37, 41).to(dtype)
    labels = torch.randint(5, (3, 37, 41))
    labels[torch.rand(labels.shape) < void] = ignored
    expected = theirs(logits, labels, ignore_index=ignored)
    assert torch.equal(accuracy(logits, labels, ignore_index=ignored), expected)


def test_every_tensor_of_a_sample_is_pinned(monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor: tensor + 1)  # needs a device
    labels = PixelData(data=torch.zeros(1, 2, 2))
    sample = SegDataSample(metainfo={'img_shape': (2, 2)}, gt_sem_seg=labels)
    pinned = sample.pin_memory()
    assert pinned.img_shape == (2, 2) and pinned.gt_sem_seg.data.eq(1).all()
    assert sample.gt_sem_seg.data.eq(0).all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_losses_are_computed_in_float32_at_least(dtype):
    head = MODELS.build(dict(type='FCNHead', in_channels=4, channels=4, num_classes=3))
    labels = PixelData(data=torch.randint(3, (1, 8, 8)))
    samples = [SegDataSample(gt_sem_seg=labels, metainfo=dict(img_shape=(8, 8)))]
    logits = (10 * torch.randn(1, 3, 8, 8)).to(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    found = head.loss_by_feat(logits, samples)['loss_ce']
    assert found.dtype == exact
    assert torch.equal(found, mmseg_patches._theirs(head, logits.to(exact), samples)['loss_ce'])
    if dtype is torch.bfloat16:  # which autocast treats operator by operator, as it did
        with torch.autocast('cpu', dtype):
            both = type(head).loss_by_feat, mmseg_patches._theirs
            found, theirs = (f(head, logits, samples) for f in both)
        assert torch.equal(found['loss_ce'], theirs['loss_ce'])
