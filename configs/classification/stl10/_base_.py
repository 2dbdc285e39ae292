_base_ = [
    '../../_base_/datasets/stl10.py',
    '../../_base_/schedules/adamw_300e.py',
    '../../_base_/classification_runtime.py',
]
# what every leaf puts into its model
task = dict(
    img_size=96,
    patch_size=12,
    num_classes=10,
)
