# The MACs of the MoE models: what two blocks with two MLPs per token add, spread over all twelve.
_base_ = 'vit_tiny_dense.py'
model = dict(mlp_ratio=14 / 3)
