# From scratch: expect 14 to 17 mIoU, as in the paper; from ImageNet: the config of in21k-pre
_base_ = '_base_.py'
model = dict(backbone=dict(model_name='vit_base_softmoe', moe=dict(num_experts=4)))
