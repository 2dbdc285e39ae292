# ImageNet-1k as class folders, with the recipe of QTClassification.
norm = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
train_dataloader = dict(
    batch_size=256,
    num_workers=12,
    worker_init_fn=dict(type='keep_worker_seed'),
    collate_fn=dict(type='default_collate'),
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='class_folder',
        data_root='data/imagenet',
        split='train',
        transform=dict(
            type='timm',
            input_size=224,
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
    num_workers=12,
    worker_init_fn=dict(type='keep_worker_seed'),
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='class_folder',
        data_root='data/imagenet',
        split='val',
        transform=dict(
            type='timm', input_size=224, crop_pct=0.875, interpolation='bilinear', **norm
        ),
    ),
)
test_dataloader = val_dataloader
del norm
