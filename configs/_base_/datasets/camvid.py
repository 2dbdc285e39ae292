# CamVid, 480x360 pixels, 11 classes, augmented by albumentations.
_base_ = 'segmentation_loaders.py'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(480, 360), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(352, 480), cat_max_ratio=0.75),
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
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale_factor=ratio, keep_ratio=True)
                for ratio in (0.75, 1.0, 1.25)
            ],
            [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
train_dataloader = dict(
    dataset=dict(
        type='CamVid',
        data_root='data/camvid',
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'),
        part='train',
        dev_size=60,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        type='CamVid',
        data_root='data/camvid',
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'),
        part='dev',
        dev_size=60,
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    dataset=dict(
        type='CamVid',
        data_root='data/camvid',
        data_prefix=dict(img_path='images/val', seg_map_path='annotations/val'),
        pipeline=test_pipeline,
    ),
)
