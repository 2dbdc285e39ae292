# STL-10, 5,000 labelled images, with the recipe of QTClassification (CIFAR-10 statistics).
_base_ = [
    '../_base_/datasets/recipe.py',
    '../_base_/models/vit.py',
    '../_base_/schedules/adamw_300e.py',
    '../_base_/classification_runtime.py',
]
model = dict(img_size=96, patch_size=12, num_classes=10)
data = dict(type='stl10', data_root='data/stl10')
images = dict(
    input_size=96,
    from_scratch=dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
)
train_dataloader = dict(dataset=dict(transform=images, **data))
val_dataloader = dict(dataset=dict(transform=images, **data))
test_dataloader = val_dataloader
del data, images
