_base_ = 'segmenter_vit_large.py'
model = dict(
    backbone=dict(
        model_name='vit_large_vqmoe',
        moe_layers='last2',
        num_experts=4,
    )
)
