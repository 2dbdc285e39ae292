_base_ = 'upernet_vit_base.py'
model = dict(backbone=dict(model_name='vit_base_patch16_224'))
