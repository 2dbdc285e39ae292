_base_ = '_base_640.py'
model = dict(backbone=dict(model_name='vit_large_patch16_224', moe=None))
