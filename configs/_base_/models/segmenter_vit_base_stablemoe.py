_base_ = 'segmenter_vit_base.py'
model = dict(
    backbone=dict(
        model_name='vit_base_stablemoe',
        moe_layers='last2',
        num_experts=4,
        top_k=2,
    )
)
