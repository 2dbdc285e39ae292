_base_ = '_base_.py'
model = dict(model_name='vit_base_patch16_224', moe=None)
