# How segmentation data sets on disk are read; each file that builds on this one names its data.
train_dataloader = dict(
    batch_size=8,
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
