# SVHN without its extra images, with the recipe of QTClassification (CIFAR-10 statistics).
_base_ = [
    '../_base_/datasets/recipe.py',
    '../_base_/models/vit.py',
    '../_base_/schedules/adamw_300e.py',
    '../_base_/classification_runtime.py',
]
model = dict(img_size=32, patch_size=4, num_classes=10)
data = dict(type='svhn', data_root='data/svhn')
images = dict(
    input_size=32,
    from_scratch=dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
)
light = dict(type='crop_flip', hflip=0.0, _delete_=True, **images)
train_dataloader = dict(dataset=dict(transform=light, **data))
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=1.0, **images), **data))
test_dataloader = val_dataloader
del data, images, light
