_base_ = '_base_.py'
model = dict(model_name='vit_base_softmoe', moe=dict(num_experts=4))
