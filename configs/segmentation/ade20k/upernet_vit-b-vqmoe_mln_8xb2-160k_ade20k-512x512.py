# From scratch; model.backbone.pretrained=True with a model of timm starts from ImageNet weights.
# UPerNet on four levels of a ViT, made a pyramid, trained and tested as mmsegmentation's. The norms
# of its heads are over the batch, in a distributed run over that of all GPUs: one image alone has
# no variance.
_base_ = [
    '../../_base_/datasets/ade20k.py',
    '../../_base_/models/segmenter.py',
    '../../_base_/segmentation_runtime.py',
]
total_batch_size = 16
train_dataloader = dict(batch_size=2)
sync_bn = 'torch'
norm_cfg = dict(type='BN', requires_grad=True)
loss = dict(type='CrossEntropyLoss', use_sigmoid=False)
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        model_name='vit_base_vqmoe',
        moe=dict(num_experts=4),
        img_size=(512, 512),
        out_indices=(2, 5, 8, 11),
    ),
    neck=dict(type='MultiLevelNeck', scales=[4, 2, 1, 0.5]),
    decode_head=dict(
        _delete_=True,
        type='UPerHead',
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        num_classes=150,
        dropout_ratio=0.1,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(loss_weight=1.0, **loss),
    ),
    auxiliary_head=dict(
        type='FCNHead',
        in_index=3,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(loss_weight=0.4, **loss),
    ),
    test_cfg=dict(mode='whole'),
)
del norm_cfg, loss
# mmsegmentation's UPerNet on ViT and Swin: AdamW for batches of 16, 1,500 iterations of warm-up,
# then linearly to 0. No bias and no norm decays here, where biases and norms do in theirs.
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=1500, by_epoch=False),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=1500, end=160000, by_epoch=False),
]
