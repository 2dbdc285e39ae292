# ViT-Ti with VQMoE in two blocks, the "small, 10M" of the paper. Another size or method is an
# option, and so is everything else: docs/how-to/commands.md shows how.
model = dict(
    type='Classifier',
    model_name='vit_tiny_vqmoe',
    moe=dict(preset='matched', moe_layers='last2', num_experts=8),
    drop_path_rate=0.1,
)
