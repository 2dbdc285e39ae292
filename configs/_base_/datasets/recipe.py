# The recipe of QTClassification for images; each file beside this one names its data. Training
# leaves out the images of dev, at which validation looks; split='trainval' takes them too.
total_batch_size = 256
train_dataloader = dict(
    batch_size=256,
    num_workers=4,
    worker_init_fn=dict(type='keep_worker_seed'),
    collate_fn=dict(type='default_collate'),
    drop_last=True,
    sampler=dict(type='SeededSampler', shuffle=True),
    dataset=dict(
        split='train',
        transform=dict(
            type='timm',
            is_training=True,
            auto_augment='rand-m9-mstd0.5-inc1',
            re_prob=0.25,
            re_mode='pixel',
            interpolation='random',
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
        split='dev', transform=dict(type='timm', crop_pct=0.875, interpolation='bilinear')
    ),
)
test_dataloader = dict(val_dataloader, dataset=dict(val_dataloader['dataset'], split='test'))
