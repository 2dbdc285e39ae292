_base_ = ['../../_base_/models/segmenter_vit_tiny_xmoe.py', '_base_.py']
model = _base_.task
