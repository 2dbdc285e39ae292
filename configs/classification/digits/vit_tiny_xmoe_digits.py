_base_ = ['../../_base_/models/vit_tiny_xmoe.py', '_base_.py']
model = _base_.task
