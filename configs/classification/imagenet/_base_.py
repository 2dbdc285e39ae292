_base_ = [
    '../../_base_/datasets/imagenet.py',
    '../../_base_/models/vit.py',
    '../../_base_/schedules/adamw_300e.py',
    '../../_base_/classification_runtime.py',
]
model = dict(
    img_size=224,
    patch_size=16,
    num_classes=1000,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5),
    label_smoothing=0.1,
)
