# CIFAR-10 as class folders, decoded into memory once, with light augmentation: on a CPU the
# transforms must not cost more than a small model. Mean and std are stated: all rows of a
# comparison are fed alike.
norm = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
train_dataloader = dict(
    batch_size=128,
    num_workers=0,
    collate_fn=dict(type='default_collate'),
    drop_last=True,
    sampler=dict(type='SeededSampler', shuffle=True),
    dataset=dict(
        type='cifar10',
        data_root='data/cifar10',
        split='train',
        in_memory=True,
        transform=dict(type='crop_flip', input_size=32, **norm),
    ),
)
val_dataloader = dict(
    batch_size=500,
    num_workers=0,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='cifar10',
        data_root='data/cifar10',
        split='dev',
        in_memory=True,
        transform=dict(type='timm', input_size=32, crop_pct=1.0, **norm),
    ),
)
test_dataloader = dict(val_dataloader, dataset=dict(val_dataloader['dataset'], split='test'))
del norm
