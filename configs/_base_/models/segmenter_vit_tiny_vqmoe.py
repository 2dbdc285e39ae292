_base_ = 'segmenter_vit_tiny.py'
model = dict(
    backbone=dict(
        model_name='vit_tiny_vqmoe',
        moe_layers='last2',
        num_experts=8,
    )
)
