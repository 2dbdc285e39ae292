_base_ = ['../../_base_/models/segmenter_vit_large_dense.py', '_base_.py']
model = _base_.task
