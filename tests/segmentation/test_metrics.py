"""mmseg's metrics, on which every reported number rests, against their definitions."""

from typing import Any

import numpy as np
import pytest
import torch
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from torch.utils._python_dispatch import TorchDispatchMode

CLASSES = 5


class Operators(TorchDispatchMode):
    """Names of those that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def by_definition(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """aAcc, mAcc and mIoU in percent; classes that occur nowhere do not count in the means."""
    right = total = 0
    hits, truth, said = ([0] * CLASSES for _ in range(3))
    for predicted, labels in pairs:
        for p, t in zip(predicted.ravel(), labels.ravel(), strict=True):
            if t == 255:
                continue
            total += 1
            right += p == t
            truth[t] += 1
            said[p] += 1
            hits[t] += p == t
    recall = [h / t for h, t in zip(hits, truth, strict=True) if t]
    iou = [h / (t + s - h) for h, t, s in zip(hits, truth, said, strict=True) if t + s - h]
    return {
        'aAcc': 100 * right / total,
        'mAcc': 100 * float(np.mean(recall)),
        'mIoU': 100 * float(np.mean(iou)),
    }


@pytest.mark.parametrize('seed', range(3))
def test_metrics_are_those_of_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # class 4 occurs in no image, class 3 in predictions only, and a fifth is ignored
    pairs = []
    for size in ((7, 9), (4, 4), (1, 12)):
        labels = rng.integers(0, 3, size)
        labels[rng.random(size) < 0.2] = 255
        predicted = np.where(
            rng.random(size) < 0.6, np.minimum(labels, 3), rng.integers(0, 4, size)
        )
        pairs.append((predicted, labels))
    metric = METRICS.build(dict(type='CheckedIoUMetric', iou_metrics=['mIoU']))
    metric.dataset_meta = {'classes': [str(i) for i in range(CLASSES)]}
    samples = [
        {
            'pred_sem_seg': {'data': torch.from_numpy(predicted)[None]},
            'gt_sem_seg': {'data': torch.from_numpy(labels)[None]},
        }
        for predicted, labels in pairs
    ]
    metric.process({}, samples)
    found = metric.evaluate(len(pairs))
    expected = by_definition(pairs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=0.005)  # two decimals are kept


@pytest.mark.parametrize(
    'dtype', [torch.int64, torch.uint8, torch.float32, torch.bfloat16], ids=str
)
@pytest.mark.parametrize('seed', range(3))
def test_areas_are_mmsegs_and_allowed_on_a_gpu_that_is_to_be_deterministic(
    seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # some beyond the classes, as of a data set with more of them
    predicted, labels = torch.randint(-1, CLASSES + 2, (2, 30, 40), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    predicted, labels = predicted.clamp(min=0).to(dtype), labels.to(dtype)  # a sigmoid's are floats
    expected = IoUMetric.intersect_and_union(predicted, labels, CLASSES, 255)
    with Operators() as called:
        found = METRICS.get('CheckedIoUMetric').intersect_and_union(predicted, labels, CLASSES, 255)
    for area, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(area, theirs, rtol=0, atol=0)
    # torch's list of what raises has `histc`, and `bincount` only of weights
    assert 'aten::bincount' in called.names and 'aten::histc' not in called.names


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('iou_metric', 'mDice'),
        *(('iou_metrics', value) for value in (['mIou'], [], [['mIoU']])),
        ('collect_dir', 'a'),
    ],
)
def test_options_that_the_metric_would_ignore_or_fail_on(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf'^CheckedIoUMetric\.{field}='):
        METRICS.build(dict(type='CheckedIoUMetric', **{field: value}))
    with pytest.raises(ValueError, match=r'^CheckedIoUMetric\.output_dir='):
        METRICS.build(dict(type='CheckedIoUMetric', format_only=True))


def test_images_without_label_maps_are_told_how_to_be_predicted() -> None:
    metric = METRICS.build(dict(type='CheckedIoUMetric'))
    metric.dataset_meta = {'classes': ('a', 'b')}
    with pytest.raises(ValueError, match=r'^CheckedIoUMetric\.format_only=False '):
        metric.process({}, [{'pred_sem_seg': {}}])
