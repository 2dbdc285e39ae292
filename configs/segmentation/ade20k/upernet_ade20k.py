# UPerNet on four levels of a ViT, made a pyramid, trained and tested as mmsegmentation's. The norms
# of its heads are over the batch, in a distributed run over that of all GPUs: one image alone has
# no variance. A batch of 16: on 8 GPUs set train_dataloader.batch_size=2.
_base_ = [
    '../../_base_/datasets/ade20k.py',
    '../../_base_/models/segmenter.py',
    '../../_base_/schedules/upernet_160k.py',
    '../../_base_/segmentation_runtime.py',
]
train_dataloader = dict(batch_size=16)
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
