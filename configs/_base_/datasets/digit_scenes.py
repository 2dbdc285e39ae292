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
