# AdamW, with smaller rates towards the first layers of a backbone that comes trained.
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(layer_decay=0.8),
)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=20000, val_interval=1000)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=500, by_epoch=False),
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=500, end=20000, by_epoch=False),
]
