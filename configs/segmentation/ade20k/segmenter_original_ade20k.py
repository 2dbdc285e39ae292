# Segmenter with the schedule of rstrudel/segmenter, dropout in the head, torch's own epsilon in the
# norms of the backbone, and windows that do not overlap and are not padded. Size and method are
# options; for Large at 640 see docs/segmentation.md.
_base_ = [
    '../../_base_/datasets/ade20k.py',
    '../../_base_/models/segmenter.py',
    '../../_base_/schedules/segmenter_original_162k.py',
    '../../_base_/segmentation_runtime.py',
]
model = dict(
    data_preprocessor=dict(size=(512, 512), test_cfg=dict(size_divisor=1)),
    backbone=dict(model_name='vit_small_vqmoe', img_size=(512, 512), norm_eps=1e-5),
    decode_head=dict(num_classes=150, drop_path_rate=0.0, drop_rate=0.1),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(512, 512)),
)
default_hooks = dict(checkpoint=dict(interval=16170))
