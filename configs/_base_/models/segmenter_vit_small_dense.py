_base_ = 'segmenter_vit_small.py'
model = dict(backbone=dict(model_name='vit_small_patch16_224'))
