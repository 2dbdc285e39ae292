# rstrudel/segmenter: 64 epochs of ADE20K in batches of 8, SGD with Nesterov momentum.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=1e-3, momentum=0.9, weight_decay=0.0, nesterov=True),
)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=161700, val_interval=16170)
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=1e-5, begin=0, end=161700, by_epoch=False),
]
