_base_ = 'segmenter.py'
model = dict(
    decode_head=dict(in_channels=192, channels=192, embed_dims=192, num_heads=3),
)
