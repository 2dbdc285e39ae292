_base_ = [
    '../_base_/datasets/camvid.py',
    '../_base_/models/segmenter.py',
    '../_base_/schedules/adamw_20k.py',
    '../_base_/segmentation_runtime.py',
]
default_hooks = dict(checkpoint=dict(interval=1000))
model = dict(
    data_preprocessor=dict(size=(352, 480)),
    backbone=dict(img_size=(352, 480)),
    decode_head=dict(num_classes=11),
    test_cfg=dict(mode='whole'),
)
