_base_ = '_base_.py'
# Two of four blocks run two MLPs in the MoE rows; here all four run one and a half.
model = dict(model_name='vit_tiny_patch16_224', mlp_ratio=6)
