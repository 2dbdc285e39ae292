# Tests see windows of the image as it is, like those of mmsegmentation's published numbers: padding
# would move the last ones. The schedule is mmsegmentation's too: SGD, and a polynomial that ends at
# a tenth.
_base_ = [
    '../../_base_/datasets/ade20k.py',
    '../../_base_/models/segmenter.py',
    '../../_base_/segmentation_runtime.py',
]
model = dict(
    data_preprocessor=dict(size=(512, 512), test_cfg=dict(size_divisor=1)),
    backbone=dict(img_size=(512, 512)),
    decode_head=dict(num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(480, 480)),
)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=1e-3, momentum=0.9, weight_decay=0.0),
)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=1e-4, begin=0, end=160000, by_epoch=False),
]
