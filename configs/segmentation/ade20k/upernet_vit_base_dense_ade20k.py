_base_ = ['../../_base_/models/upernet_vit_base_dense.py', '_base_.py']
model = dict(auxiliary_head=dict(num_classes=150), **_base_.task)
