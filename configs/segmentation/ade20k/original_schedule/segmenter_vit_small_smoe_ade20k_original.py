_base_ = ['../../../_base_/models/segmenter_vit_small_smoe.py', '_base_.py']
model = _base_.task
