_base_ = [
    '../_base_/datasets/digits.py',
    '../_base_/models/vit.py',
    '../_base_/schedules/adamw_300e.py',
    '../_base_/classification_runtime.py',
]
model = dict(img_size=32, patch_size=4, num_classes=10)
