# How segmentation data sets on disk are read; each file that builds on this one names its data.
total_batch_size = 8  # our tools divide it by their processes, others read the batch of each
train_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    worker_init_fn=dict(type='keep_worker_seed'),
    sampler=dict(type='SeededInfiniteSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    worker_init_fn=dict(type='keep_worker_seed'),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = val_dataloader
# Sizes and mirror images that tools/test.py --tta averages over, for tests that resize nothing: the
# ratios are those of the images. Data whose tests resize have a pipeline of their own.
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale_factor=ratio, keep_ratio=True)
                for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
