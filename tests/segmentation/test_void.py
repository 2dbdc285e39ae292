"""Label maps without a single label: nothing to learn from, and nothing breaks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmseg.registry import METRICS

from vqmoe_vision.moe import METHODS
from vqmoe_vision.segmentation.datasets import CheckedDataset

from .conftest import tiny_segmentor, training_batch, write_pair

VOID = 255


# mmseg cannot average weighted classes over labels, whatever the labels
@pytest.mark.parametrize(
    ('class_weight', 'average_over_labels'),
    [(None, False), (None, True), ([1.0, 2.0, 0.5, 1.0], False)],
)
def test_a_batch_without_labels_has_no_task_loss(
    class_weight: list[float] | None, average_over_labels: bool
) -> None:
    model = tiny_segmentor()
    model.decode_head.loss_decode.class_weight = class_weight
    model.decode_head.loss_decode.avg_non_ignore = average_over_labels
    batch = training_batch(model)
    for sample in batch['data_samples']:
        sample.gt_sem_seg.data.fill_(VOID)
    losses = model(**batch, mode='loss')
    assert losses['decode.loss_ce'] == 0
    assert losses['decode.acc_seg'].isfinite()  # mmseg's 0 of 0 pixels are 100 percent
    total, _ = model.parse_losses(losses)
    total.backward()
    assert total.isfinite()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in gradients.values())
    # only the auxiliary losses pull, which do not look at labels
    assert not any(grad.any() for name, grad in gradients.items() if 'decode_head' in name)


@pytest.mark.parametrize('method', METHODS)
def test_an_image_without_labels_leaves_those_of_the_others(method: str) -> None:
    model = tiny_segmentor(f'vit_tiny_{method}').eval()  # no router noise
    batch = training_batch(model)
    inputs, samples = batch['inputs'], batch['data_samples']
    samples[1].gt_sem_seg.data.fill_(VOID)
    alone = model(inputs[:1], samples[:1], mode='loss')['decode.loss_ce']
    both = model(inputs, samples, mode='loss')['decode.loss_ce']
    # mmseg's mean is over all pixels: half of them are void
    torch.testing.assert_close(both, alone / 2)


@pytest.mark.parametrize('reduce_zero_label', [False, True])
def test_a_void_label_map_passes_the_pipeline(reduce_zero_label: bool, tmp_path: Path) -> None:
    void = np.full((12, 12), 0 if reduce_zero_label else VOID)
    write_pair(tmp_path, 'images/a.jpg', 'labels/a.png', void)
    crop = dict(type='RandomCrop', crop_size=(8, 8), cat_max_ratio=0.75)
    pipeline = [dict(type='LoadImage'), dict(type='LoadLabels'), crop, dict(type='PackSegInputs')]
    data = CheckedDataset(
        metainfo=dict(classes=('a', 'b')),
        data_root=str(tmp_path),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        reduce_zero_label=reduce_zero_label,
        pipeline=pipeline,
    )
    assert (data[0]['data_samples'].gt_sem_seg.data == VOID).all()


def test_metrics_of_nothing_are_no_numbers() -> None:
    metric = METRICS.build(dict(type='CheckedIoUMetric', iou_metrics=['mIoU']))
    metric.dataset_meta = {'classes': ['a', 'b']}
    labels = torch.full((1, 4, 4), VOID)
    sample = {'pred_sem_seg': {'data': torch.zeros(1, 4, 4)}, 'gt_sem_seg': {'data': labels}}
    metric.process({}, [sample])
    with pytest.warns(RuntimeWarning, match='Mean of empty slice'):
        found = metric.evaluate(1)
    assert found.keys() == {'aAcc', 'mAcc', 'mIoU'}
    assert all(np.isnan(value) for value in found.values())
