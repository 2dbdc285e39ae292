_base_ = 'segmenter.py'
model = dict(
    decode_head=dict(in_channels=384, channels=384, embed_dims=384, num_heads=6),
)
