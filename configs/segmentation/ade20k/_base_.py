# Tests see windows of the image as it is, like those of mmsegmentation's published numbers: padding
# would move the last ones.
_base_ = [
    '../../_base_/datasets/ade20k.py',
    '../../_base_/models/segmenter.py',
    '../../_base_/schedules/segmenter_160k.py',
    '../../_base_/segmentation_runtime.py',
]
model = dict(
    data_preprocessor=dict(size=(512, 512), test_cfg=dict(size_divisor=1)),
    backbone=dict(img_size=(512, 512)),
    decode_head=dict(num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(480, 480)),
)
