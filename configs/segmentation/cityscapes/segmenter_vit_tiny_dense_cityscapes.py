_base_ = ['../../_base_/models/segmenter_vit_tiny_dense.py', '_base_.py']
model = _base_.task
