# Twice as many slots as the 65 tokens of 8x8 patches, about: the compute of two experts per token.
model = dict(
    type='Classifier',
    drop_path_rate=0.1,
    model_name='vit_base_softmoe',
    moe_layers='last2',
    num_experts=4,
    slots_per_expert=32,
)
