# scikit-learn's scans of handwritten digits: 8x8 pixels, enlarged to 32x32.
norm = dict(from_scratch=dict(mean=(0.3, 0.3, 0.3), std=(0.35, 0.35, 0.35)))
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    collate_fn=dict(type='default_collate'),
    drop_last=True,
    sampler=dict(type='SeededSampler', shuffle=True),
    dataset=dict(
        type='digits',
        split='train',
        # the crop stands in for a small random affine: digits must not be flipped
        transform=dict(
            type='timm',
            input_size=32,
            is_training=True,
            scale=(0.7, 1.0),
            ratio=(0.85, 1.18),
            hflip=0.0,
            color_jitter=0.0,
            interpolation='bilinear',
            **norm,
        ),
    ),
)
val_dataloader = dict(
    batch_size=180,
    num_workers=0,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='digits',
        split='dev',
        transform=dict(type='timm', input_size=32, crop_pct=1.0, interpolation='bilinear', **norm),
    ),
)
test_dataloader = dict(val_dataloader, dataset=dict(val_dataloader['dataset'], split='test'))
del norm
