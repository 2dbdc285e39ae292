_base_ = '_base_640.py'
model = dict(backbone=dict(model_name='vit_large_smoe', moe=dict(num_experts=4)))
