# A comparison that fits a CPU; rows in configs/comparisons, what came of it in docs/evidence.
_base_ = '../_base_/classification_runtime.py'
model = dict(
    type='Classifier',
    model_name='vit_tiny_vqmoe',
    moe=dict(preset='matched'),
    num_classes=10,
    img_size=32,
    patch_size=8,
    embed_dim=128,
    depth=4,
    num_heads=4,
    class_token=False,
    global_pool='avg',
)
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
train_cfg = dict(type='ResumableEpochLoop', max_epochs=6)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, end=1, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        begin=1,
        end=6,
        T_max=5,
        eta_min=1e-5,
        convert_to_iter_based=True,
    ),
]
# CIFAR-10 as class folders, decoded into memory once, with light augmentation: on a CPU the
# transforms must not cost more than a small model. Mean and std are stated: all rows of a
# comparison are fed alike.
norm = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
total_batch_size = 128
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
