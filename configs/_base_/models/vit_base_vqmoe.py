# One expert by the router and one by the code: the compute of two experts per token.
model = dict(
    type='Classifier',
    drop_path_rate=0.1,
    model_name='vit_base_vqmoe',
    moe_layers='last2',
    num_experts=4,
)
