_base_ = [
    '../_base_/datasets/pascal_context.py',
    '../_base_/models/segmenter.py',
    '../_base_/schedules/segmenter_80k.py',
    '../_base_/segmentation_runtime.py',
]
default_hooks = dict(checkpoint=dict(interval=8000))
model = dict(
    data_preprocessor=dict(size=(480, 480)),
    backbone=dict(img_size=(480, 480)),
    decode_head=dict(num_classes=59),
    test_cfg=dict(mode='slide', crop_size=(480, 480), stride=(320, 320)),
)
