_base_ = '_base_.py'
model = dict(model_name='vit_tiny_xmoe')
