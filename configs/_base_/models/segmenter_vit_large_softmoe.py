# Twice as many slots as the 1024 tokens of 512x512 pixels: the compute of two experts per token.
_base_ = 'segmenter_vit_large.py'
model = dict(
    backbone=dict(
        model_name='vit_large_softmoe',
        moe_layers='last2',
        num_experts=4,
        slots_per_expert=512,
    )
)
