"""What only a validation uses is refused when the model or the metric is built."""

from typing import Any

import pytest
from mmseg.registry import METRICS

from .conftest import tiny_segmentor


@pytest.mark.parametrize('name', ['strid', 'crop_sise'])
def test_windows_that_mmseg_would_pass_over(name: str) -> None:
    with pytest.raises(ValueError, match=rf'^model\.test_cfg\.{name}='):
        tiny_segmentor(test_cfg={'mode': 'whole', name: (8, 8)})


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (dict(iou_metric='mDice'), "iou_metric='mDice' is not .*iou_metrics"),
        (dict(iou_metrics=['mIou']), r"iou_metrics=\['mIou'\] is not possible: some of mIoU, mDi"),
        (dict(iou_metrics=[]), r'iou_metrics=\[\] is not possible'),
        (dict(iou_metrics=[['mIoU']]), r"iou_metrics=\[\['mIoU'\]\] is not possible"),
        (dict(collect_dir='a'), "collect_dir='a' is not possible"),
        (dict(format_only=True), 'output_dir=None is not possible: a folder, for the predictions'),
    ],
)
def test_options_that_the_metric_would_ignore_or_fail_on(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=rf'^CheckedIoUMetric\.{said}'):
        METRICS.build(dict(type='CheckedIoUMetric', **options))


@pytest.mark.parametrize('kind', ['mIoU', 'mDice', 'mFscore'])
def test_options_of_mmseg_are_taken(kind: str, tmp_path) -> None:
    options = dict(ignore_index=0, nan_to_num=0, beta=2, collect_device='cpu', prefix='x')
    assert METRICS.build(dict(type='CheckedIoUMetric', iou_metrics=kind, **options)).prefix == 'x'
    assert METRICS.get('CheckedIoUMetric')(0, [kind]).ignore_index == 0  # in mmseg's order
    written = dict(type='CheckedIoUMetric', format_only=True, output_dir=str(tmp_path))
    assert METRICS.build(written).output_dir == str(tmp_path)


def test_images_without_label_maps_are_told_how_to_be_predicted() -> None:
    said = r'^CheckedIoUMetric\.format_only=False is not possible: the images have no label maps: '
    with pytest.raises(ValueError, match=said):
        metric = METRICS.build(dict(type='CheckedIoUMetric'))
        metric.dataset_meta = {'classes': ('a', 'b')}
        metric.process({}, [{'pred_sem_seg': {}}])
