# CIFAR-100 with the recipe of QTClassification.
norm = dict(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
train_dataloader = dict(
    batch_size=256,
    num_workers=4,
    worker_init_fn=dict(type='keep_worker_seed'),
    collate_fn=dict(type='default_collate'),
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='cifar100',
        data_root='data/cifar100',
        split='train',
        transform=dict(
            type='timm',
            input_size=32,
            is_training=True,
            auto_augment='rand-m9-mstd0.5-inc1',
            re_prob=0.25,
            re_mode='pixel',
            interpolation='random',
            **norm,
        ),
    ),
)
val_dataloader = dict(
    batch_size=256,
    num_workers=4,
    worker_init_fn=dict(type='keep_worker_seed'),
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='cifar100',
        data_root='data/cifar100',
        split='val',
        transform=dict(
            type='timm', input_size=32, crop_pct=0.875, interpolation='bilinear', **norm
        ),
    ),
)
test_dataloader = val_dataloader
del norm
