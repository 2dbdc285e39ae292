# The backbone of configs/classification/digits/demo, whose checkpoints it can start from:
# model.backbone.checkpoint=work_dirs/.../epoch_40.pth
_base_ = [
    '../../_base_/datasets/digit_scenes.py',
    '../../_base_/models/segmenter.py',
    '../../_base_/schedules/adamw_1k.py',
    '../../_base_/segmentation_runtime.py',
]
model = dict(
    data_preprocessor=dict(
        from_scratch=dict(mean=[76.5, 76.5, 76.5], std=[89.25, 89.25, 89.25]),
        size=(48, 48),
        test_cfg=dict(size_divisor=8),
    ),
    backbone=dict(
        moe=dict(_delete_=True, preset='matched'),
        img_size=(48, 48),
        patch_size=8,
        depth=4,
        embed_dim=96,
        num_heads=3,
        class_token=False,
        drop_path_rate=0.0,
    ),
    decode_head=dict(num_classes=11),
    test_cfg=dict(mode='slide', crop_size=(48, 48), stride=(12, 12)),
)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=200))
