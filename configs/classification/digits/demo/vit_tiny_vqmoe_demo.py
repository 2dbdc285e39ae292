# Depth, width and patch as suit scans of 8x8 pixels; make demo trains this, and starts
# the scenes of digits from it: 48 pixels leave patches enough to draw a digit.
_base_ = '../../../_base_/classification_runtime.py'
model = dict(
    type='Classifier',
    model_name='vit_tiny_vqmoe',
    moe=dict(preset='matched'),
    num_classes=10,
    img_size=48,
    patch_size=8,
    depth=4,
    embed_dim=96,
    num_heads=3,
    class_token=False,
    global_pool='avg',
)
# scikit-learn's scans of handwritten digits: 8x8 pixels, enlarged to 48x48.
norm = dict(from_scratch=dict(mean=(0.3, 0.3, 0.3), std=(0.35, 0.35, 0.35)))
total_batch_size = 64
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
            input_size=48,
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
        transform=dict(type='timm', input_size=48, crop_pct=1.0, interpolation='bilinear', **norm),
    ),
)
test_dataloader = dict(val_dataloader, dataset=dict(val_dataloader['dataset'], split='test'))
del norm
optim_wrapper = dict(
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
train_cfg = dict(type='ResumableEpochLoop', max_epochs=40, val_interval=5)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, end=2, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        begin=2,
        end=40,
        T_max=38,
        eta_min=1e-5,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=5))
