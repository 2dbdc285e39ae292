# Segmenter: the last features of a ViT, decoded by a transformer with one token per class. The
# decoder takes width and heads from the backbone.
model = dict(
    type='MoeEncoderDecoder',
    data_preprocessor=dict(
        type='CheckedPreProcessor',
        # of weights that are known to want others, mean and std are theirs
        from_scratch=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        test_cfg=dict(size_divisor=16),
    ),
    backbone=dict(
        type='TimmViT',
        model_name='vit_tiny_vqmoe',
        moe=dict(preset='matched', moe_layers='last2', num_experts=8),
        drop_path_rate=0.1,
    ),
    decode_head=dict(
        type='SegmenterMaskTransformerHead',
        num_layers=2,
        dropout_ratio=0.0,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
)
