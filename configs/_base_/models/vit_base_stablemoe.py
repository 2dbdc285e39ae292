model = dict(
    type='Classifier',
    drop_path_rate=0.1,
    model_name='vit_base_stablemoe',
    moe_layers='last2',
    num_experts=4,
    top_k=2,
)
