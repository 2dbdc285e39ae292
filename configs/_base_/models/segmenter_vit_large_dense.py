_base_ = 'segmenter_vit_large.py'
model = dict(backbone=dict(model_name='vit_large_patch16_224'))
