_base_ = '_base_.py'
model = dict(backbone=dict(model_name='vit_tiny_vqmoe'))
