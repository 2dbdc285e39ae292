# A comparison that fits a CPU; docs/results.md says which options make each of its rows.
_base_ = ['../_base_/datasets/cifar10_budget.py', '../_base_/classification_runtime.py']
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
train_cfg = dict(by_epoch=True, max_epochs=6)
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
