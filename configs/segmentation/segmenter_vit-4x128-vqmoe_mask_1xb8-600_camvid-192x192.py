# A comparison that fits a CPU; rows in configs/comparisons, what came of it in docs/evidence.
_base_ = [
    '../_base_/datasets/camvid.py',
    '../_base_/models/segmenter.py',
    '../_base_/segmentation_runtime.py',
]
model = dict(
    # mean and std are stated: all rows of a comparison are fed alike
    data_preprocessor=dict(
        _delete_=True,
        type='CheckedPreProcessor',
        mean=[127.5, 127.5, 127.5],
        std=[127.5, 127.5, 127.5],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(192, 192),
        test_cfg=dict(size_divisor=16),
    ),
    backbone=dict(
        moe=dict(_delete_=True, preset='matched'),
        img_size=(192, 192),
        depth=4,
        embed_dim=128,
        num_heads=4,
        class_token=False,
        drop_path_rate=0.0,
    ),
    decode_head=dict(num_classes=11),
    test_cfg=dict(mode='slide', crop_size=(192, 192), stride=(144, 144)),
)
# minutes on one core of a CPU
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=600, val_interval=600)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=50, by_epoch=False),
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=50, end=600, by_epoch=False),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=600))
# CamVid in crops that a CPU can train on, and tested at a scale that training has seen.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(480, 360), ratio_range=(0.54, 0.8), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(192, 192), cat_max_ratio=0.75),
    dict(
        type='Albumentations',
        transforms=[
            dict(type='HorizontalFlip'),
            dict(type='Rotate', limit=5, border_mode=0),
            dict(type='ColorJitter', brightness=0.3, contrast=0.3, saturation=0.3, hue=0.02),
        ],
    ),
    dict(type='PackSegInputs'),
]
# labels are loaded after the image is resized: predictions are compared at the original size
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=0.65, keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
# ratios of the size that a test sees
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale_factor=0.65 * ratio, keep_ratio=True)
                for ratio in (0.75, 1.0, 1.25)
            ],
            [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
# a list is not merged: this pipeline replaces that of camvid.py
total_batch_size = 8
train_dataloader = dict(
    batch_size=8, num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline)
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
