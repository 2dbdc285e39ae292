model = dict(
    type='Classifier',
    drop_path_rate=0.1,
    model_name='vit_tiny_stablemoe',
    moe_layers='last2',
    num_experts=8,
    top_k=2,
)
