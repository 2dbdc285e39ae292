# CIFAR-100 with the recipe of QTClassification.
_base_ = 'recipe.py'
data = dict(type='cifar100', data_root='data/cifar100')
images = dict(
    input_size=32,
    from_scratch=dict(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
)
train_dataloader = dict(dataset=dict(transform=images, **data))
val_dataloader = dict(dataset=dict(transform=images, **data))
test_dataloader = val_dataloader
del data, images
