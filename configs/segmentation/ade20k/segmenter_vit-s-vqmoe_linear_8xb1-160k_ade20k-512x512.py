# From scratch: expect 14 to 17 mIoU, as in the paper; from ImageNet: the config of in21k-pre
# Segmenter's linear head: one 1x1 convolution.
_base_ = '_base_.py'
model = dict(
    backbone=dict(model_name='vit_small_vqmoe'),
    decode_head=dict(
        _delete_=True,
        type='FCNHead',
        num_convs=0,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=150,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
)
