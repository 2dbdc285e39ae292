# From scratch: expect 14 to 17 mIoU, as in the paper; from ImageNet: the config of in21k-pre
_base_ = 'segmenter_vit-l-vqmoe_mask_8xb1-160k_ade20k-640x640.py'
model = dict(backbone=dict(model_name='vit_large_softmoe'))
