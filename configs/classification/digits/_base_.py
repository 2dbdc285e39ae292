_base_ = [
    '../../_base_/datasets/digits.py',
    '../../_base_/schedules/adamw_300e.py',
    '../../_base_/classification_runtime.py',
]
# what every leaf puts into its model
task = dict(
    img_size=32,
    patch_size=4,
    num_classes=10,
)
