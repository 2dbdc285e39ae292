_base_ = 'segmenter_vit_base.py'
model = dict(backbone=dict(model_name='vit_base_patch16_224'))
