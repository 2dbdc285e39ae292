# From scratch: expect 14 to 17 mIoU, as in the paper; from ImageNet: the config of in21k-pre
# Segmenter with the schedule of rstrudel/segmenter, dropout in the head, torch's own epsilon in the
# norms of the backbone, and windows that do not overlap and are not padded. Size and method are
# options. Large at 640 is segmenter_vit-l_mask_8xb1-160k_ade20k-640x640.py with
# model.backbone.norm_eps=1e-5 'model.test_cfg.stride=(640,640)'.
_base_ = [
    '../../_base_/datasets/ade20k.py',
    '../../_base_/models/segmenter.py',
    '../../_base_/segmentation_runtime.py',
]
model = dict(
    data_preprocessor=dict(size=(512, 512), test_cfg=dict(size_divisor=1)),
    backbone=dict(model_name='vit_small_vqmoe', img_size=(512, 512), norm_eps=1e-5),
    decode_head=dict(num_classes=150, drop_path_rate=0.0, drop_rate=0.1),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(512, 512)),
)
default_hooks = dict(checkpoint=dict(interval=16170))
# rstrudel/segmenter: 64 epochs of ADE20K in batches of 8, SGD with Nesterov momentum.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=1e-3, momentum=0.9, weight_decay=0.0, nesterov=True),
)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=161700, val_interval=16170)
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=1e-5, begin=0, end=161700, by_epoch=False),
]
