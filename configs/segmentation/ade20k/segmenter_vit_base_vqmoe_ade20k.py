_base_ = '_base_.py'
model = dict(backbone=dict(model_name='vit_base_vqmoe', moe=dict(num_experts=4)))
