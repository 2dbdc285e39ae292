_base_ = ['../../_base_/models/segmenter_vit_tiny_softmoe.py', '_base_.py']
model = _base_.task
# two slots per token of 768x768 pixels
model['backbone']['slots_per_expert'] = 576
