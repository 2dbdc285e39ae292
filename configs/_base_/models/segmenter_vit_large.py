_base_ = 'segmenter.py'
model = dict(
    decode_head=dict(in_channels=1024, channels=1024, embed_dims=1024, num_heads=16),
)
