model = dict(
    type='Classifier',
    drop_path_rate=0.1,
    model_name='vit_tiny_patch16_224',
)
