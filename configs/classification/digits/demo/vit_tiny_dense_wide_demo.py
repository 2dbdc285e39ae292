# Two of four blocks of the MoE models run two MLPs; here all four run one and a half.
_base_ = '_base_.py'
model = dict(model_name='vit_tiny_patch16_224', mlp_ratio=6)
