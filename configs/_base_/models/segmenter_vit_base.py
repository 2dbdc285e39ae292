_base_ = 'segmenter.py'
model = dict(
    decode_head=dict(in_channels=768, channels=768, embed_dims=768, num_heads=12),
)
