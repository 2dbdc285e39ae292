# The same weights, with experts made of the MLPs of two blocks.
_base_ = '_base_.py'
model = dict(
    backbone=dict(
        model_name='vit_small_patch16_384.augreg_in21k_ft_in1k',
        pretrained=True,
        moe=dict(method='vqmoe'),
    )
)
