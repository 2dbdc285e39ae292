"""What only a validation uses is refused when the model or the metric is built."""

from typing import Any

import pytest
from mmseg.registry import METRICS

from vqmoe_vision.engine.reported import reported
from vqmoe_vision.segmentation.windows import check_test_cfg

from .conftest import tiny_segmentor

SLIDE = dict(mode='slide', crop_size=(32, 32), stride=(16, 24))


@pytest.mark.parametrize(
    ('changed', 'said'),
    [
        (dict(mode='silde'), "mode='silde' is not possible: 'whole', or 'slide' with crop_size"),
        (dict(mode=None), "mode=None is not possible: 'whole', or"),
        (dict(stride=None), 'stride=None is not possible: two whole numbers, height and width'),
        (dict(crop_size=None), 'crop_size=None is not possible: two whole numbers'),
        (dict(crop_size=32), 'crop_size=32 is not possible: two whole numbers'),
        (dict(stride=(0, 8)), r'stride=\(0, 8\) is not possible: two whole numbers'),
        (dict(stride=(16, 33)), r'stride=\(16, 33\) is not possible: at most crop_size=\(32, 32\)'),
        (dict(strid=(8, 8)), r'strid=\(8, 8\) is not possible: .*; did you mean stride\?$'),
        (dict(crop_sise=(8, 8)), r'crop_sise=\(8, 8\) is not .*; did you mean crop_size\?$'),
    ],
)
def test_windows_that_no_validation_could_use(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf'^model\.test_cfg\.{said}'):
        check_test_cfg({**SLIDE, **changed})


def test_the_model_looks_at_them() -> None:
    with pytest.raises(ValueError, match=r"^model\.test_cfg\.mode='silde'"):
        tiny_segmentor(test_cfg=dict(mode='silde'))
    check_test_cfg(SLIDE)
    check_test_cfg({**SLIDE, 'stride': [32, 32]})
    check_test_cfg({**SLIDE, 'mode': 'whole', 'stride': None})  # as a base may leave them


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (dict(iou_metric='mDice'), "iou_metric='mDice' is not .*; did you mean iou_metrics"),
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
    with pytest.raises(ValueError, match=rf'^IoUMetric\.{said}'):
        METRICS.build(dict(type='IoUMetric', **options))


@pytest.mark.parametrize('kind', ['mIoU', 'mDice', 'mFscore'])
def test_options_of_mmseg_are_taken(kind: str, tmp_path) -> None:
    options = dict(ignore_index=0, nan_to_num=0, beta=2, collect_device='cpu', prefix='x')
    known = reported(dict(type='IoUMetric', iou_metrics=kind, **options))
    assert known is not None and f'x/{kind}' in known
    assert METRICS.get('IoUMetric')(0, [kind]).ignore_index == 0  # in mmseg's order
    written = dict(type='IoUMetric', format_only=True, output_dir=str(tmp_path))
    assert reported(written) == set()


def test_images_without_label_maps_are_told_how_to_be_predicted() -> None:
    said = r'^IoUMetric\.format_only=False is not possible: the images have no label maps: '
    with pytest.raises(ValueError, match=said):
        metric = METRICS.build(dict(type='IoUMetric'))
        metric.dataset_meta = {'classes': ('a', 'b')}
        metric.process({}, [{'pred_sem_seg': {}}])
