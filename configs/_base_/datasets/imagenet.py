# ImageNet-1k as class folders, with the recipe of QTClassification.
_base_ = 'recipe.py'
data = dict(type='class_folder', data_root='data/imagenet', dev_size=10000)
images = dict(
    input_size=224,
    from_scratch=dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
)
train_dataloader = dict(num_workers=12, dataset=dict(transform=images, **data))
val_dataloader = dict(num_workers=12, dataset=dict(transform=images, **data))
test_dataloader = val_dataloader
del data, images
