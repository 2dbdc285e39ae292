_base_ = ['../../_base_/models/vit_tiny_dense.py', '_base_.py']
model = _base_.task
