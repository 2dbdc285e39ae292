_base_ = 'segmenter_vit_large.py'
model = dict(
    backbone=dict(
        model_name='vit_large_xmoe',
        moe_layers='last2',
        num_experts=4,
        top_k=2,
    )
)
