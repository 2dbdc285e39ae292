# twice as many slots as the 197 tokens, about
_base_ = ['../../_base_/models/vit_tiny_softmoe.py', '_base_.py']
model = dict(slots_per_expert=49, **_base_.task)
