_base_ = 'segmenter_vit_small.py'
model = dict(
    backbone=dict(
        model_name='vit_small_smoe',
        moe_layers='last2',
        num_experts=8,
        top_k=2,
    )
)
