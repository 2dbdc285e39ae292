# Scenes of scikit-learn's scans of digits, made on the fly: there is nothing to load. Digits must
# not be flipped.
train_pipeline = [
    dict(
        type='Albumentations',
        transforms=[
            dict(type='Affine', scale=(0.8, 1.25), rotate=(-10, 10), translate_percent=(-0.1, 0.1)),
            dict(type='ColorJitter', brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05),
        ],
    ),
    dict(type='PackSegInputs'),
]
test_pipeline = [dict(type='PackSegInputs')]
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
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='DigitScenes', split='train', num_scenes=2000, size=96, pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='DigitScenes', split='val', num_scenes=200, size=96, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
