_base_ = ['../../_base_/models/segmenter_vit_small_stablemoe.py', '_base_.py']
model = _base_.task
