# CamVid in crops that a CPU can train on, and tested at a scale that training has seen.
_base_ = 'camvid.py'
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
# a list is not merged: this pipeline replaces that of camvid.py
train_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline)
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
