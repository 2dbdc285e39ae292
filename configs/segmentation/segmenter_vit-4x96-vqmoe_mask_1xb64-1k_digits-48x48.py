# The backbone of configs/classification/digits/demo, whose checkpoints it can start from:
# model.backbone.checkpoint=work_dirs/.../epoch_40.pth
_base_ = [
    '../_base_/models/segmenter.py',
    '../_base_/segmentation_runtime.py',
]
model = dict(
    data_preprocessor=dict(
        from_scratch=dict(mean=[76.5, 76.5, 76.5], std=[89.25, 89.25, 89.25]),
        size=(48, 48),
        test_cfg=dict(size_divisor=8),
    ),
    backbone=dict(
        model_name='vit_tiny_vqmoe',
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
# Minutes on a CPU. Larger rates undo what the classifier has learned.
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1000, val_interval=200)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=30, by_epoch=False),
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=30, end=1000, by_epoch=False),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=200))
# Scenes of scikit-learn's scans of digits, made on the fly: there is nothing to load, and
# LoadImageFromFile is for mmsegmentation's tools that predict files. Training sees
# crops of the size of the classifier's images, so that its position embedding keeps its meaning,
# and tests slide a window of that size, as Segmenter does on photographs. Digits must not be
# flipped.
train_pipeline = [
    dict(type='RandomCrop', crop_size=(48, 48), cat_max_ratio=0.95),
    dict(type='PackSegInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
tta_pipeline = [
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale_factor=ratio, keep_ratio=True)
                for ratio in (0.75, 1.0, 1.25)
            ],
            [dict(type='PackSegInputs')],
        ],
    ),
]
total_batch_size = 64
train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='SeededInfiniteSampler', shuffle=True),
    dataset=dict(
        type='DigitScenes', split='train', num_scenes=20000, size=96, pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='DigitScenes', split='dev', num_scenes=100, size=96, pipeline=test_pipeline),
)
test_dataloader = dict(val_dataloader, dataset=dict(val_dataloader['dataset'], split='test'))
