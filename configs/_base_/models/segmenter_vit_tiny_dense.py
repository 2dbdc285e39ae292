_base_ = 'segmenter_vit_tiny.py'
model = dict(backbone=dict(model_name='vit_tiny_patch16_224'))
