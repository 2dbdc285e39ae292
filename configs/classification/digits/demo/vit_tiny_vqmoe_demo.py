# Depth, width and patch as suit scans of 8x8 pixels; make demo trains this, and starts
# configs/segmentation/digit_scenes from it: 48 pixels leave patches enough to draw a digit.
_base_ = ['../../../_base_/datasets/digits.py', '../../../_base_/classification_runtime.py']
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
train_dataloader = dict(dataset=dict(transform=dict(input_size=48)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=48)))
test_dataloader = val_dataloader
optim_wrapper = dict(
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
train_cfg = dict(by_epoch=True, max_epochs=40, val_interval=5)
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
