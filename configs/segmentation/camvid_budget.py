# A comparison that fits a CPU; docs/results.md says which options make each of its rows.
_base_ = [
    '../_base_/datasets/camvid_budget.py',
    '../_base_/models/segmenter.py',
    '../_base_/schedules/adamw_600.py',
    '../_base_/segmentation_runtime.py',
]
model = dict(
    # mean and std are stated: all rows of a comparison are fed alike
    data_preprocessor=dict(
        _delete_=True,
        type='SegDataPreProcessor',
        mean=[127.5, 127.5, 127.5],
        std=[127.5, 127.5, 127.5],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(192, 192),
        test_cfg=dict(size_divisor=16),
    ),
    backbone=dict(
        moe=dict(_delete_=True, preset='matched'),
        img_size=(192, 192),
        depth=4,
        embed_dim=128,
        num_heads=4,
        class_token=False,
        drop_path_rate=0.0,
    ),
    decode_head=dict(num_classes=11),
    test_cfg=dict(mode='slide', crop_size=(192, 192), stride=(144, 144)),
)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=600))
