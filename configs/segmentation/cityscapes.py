_base_ = [
    '../_base_/datasets/cityscapes.py',
    '../_base_/models/segmenter.py',
    '../_base_/schedules/segmenter_80k.py',
    '../_base_/segmentation_runtime.py',
]
default_hooks = dict(checkpoint=dict(interval=8000))
model = dict(
    data_preprocessor=dict(size=(768, 768)),
    backbone=dict(img_size=(768, 768)),
    decode_head=dict(num_classes=19),
    test_cfg=dict(mode='slide', crop_size=(768, 768), stride=(512, 512)),
)
