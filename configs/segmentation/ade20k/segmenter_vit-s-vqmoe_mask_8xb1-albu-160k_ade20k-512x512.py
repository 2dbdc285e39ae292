# From scratch: expect 14 to 17 mIoU, as in the paper; from ImageNet: the config of in21k-pre
# Segmenter with albumentations in place of mmsegmentation's flips and colours: rotation and blur as
# PSPNet's own code has them for ADE20K (hszhao/semseg), and the ranges of PhotoMetricDistortion.
_base_ = '_base_.py'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75),
    dict(
        type='Albumentations',
        transforms=[
            dict(type='HorizontalFlip'),
            dict(type='Rotate', limit=10, border_mode=0, fill=127),
            dict(type='ColorJitter', brightness=0.125, contrast=0.5, saturation=0.5, hue=0.1),
            dict(type='GaussianBlur', blur_limit=(5, 5), sigma_limit=(1.1, 1.1)),
        ],
    ),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
model = dict(backbone=dict(model_name='vit_small_vqmoe'))
