# QTClassification: AdamW, batch 256, 300 epochs with 20 of warm-up. Two differences: biases, norms
# and position embeddings do not decay, and the cosine starts where the warm-up ends.
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=2.5e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
train_cfg = dict(type='ResumableEpochLoop', max_epochs=300)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.004, end=20, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        begin=20,
        end=300,
        T_max=280,
        eta_min=1e-5,
        convert_to_iter_based=True,
    ),
]
