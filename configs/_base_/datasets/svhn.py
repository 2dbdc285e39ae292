# SVHN without its extra images, with the recipe of QTClassification (CIFAR-10 statistics).
norm = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
train_dataloader = dict(
    batch_size=256,
    num_workers=4,
    worker_init_fn=dict(type='keep_worker_seed'),
    collate_fn=dict(type='default_collate'),
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='svhn',
        data_root='data/svhn',
        split='train',
        transform=dict(type='crop_flip', input_size=32, hflip=0.0, **norm),
    ),
)
val_dataloader = dict(
    batch_size=256,
    num_workers=4,
    worker_init_fn=dict(type='keep_worker_seed'),
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='svhn',
        data_root='data/svhn',
        split='test',
        transform=dict(type='timm', input_size=32, crop_pct=1.0, interpolation='bilinear', **norm),
    ),
)
test_dataloader = val_dataloader
del norm
