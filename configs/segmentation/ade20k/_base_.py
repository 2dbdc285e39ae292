# Tests see windows of the image as it is, like those of mmsegmentation's published numbers: padding
# would move the last ones. Training is twice as long as on smaller data sets, as theirs.
_base_ = [
    '../../_base_/datasets/ade20k.py',
    '../../_base_/models/segmenter.py',
    '../../_base_/schedules/segmenter_80k.py',
    '../../_base_/segmentation_runtime.py',
]
model = dict(
    data_preprocessor=dict(size=(512, 512), test_cfg=dict(size_divisor=1)),
    backbone=dict(img_size=(512, 512)),
    decode_head=dict(num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(480, 480)),
)
train_cfg = dict(max_iters=160000, val_interval=16000)
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=1e-4, begin=0, end=160000, by_epoch=False),
]
