# CIFAR-10 with the recipe of QTClassification.
_base_ = 'recipe.py'
data = dict(type='cifar10', data_root='data/cifar10')
images = dict(
    input_size=32,
    from_scratch=dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
)
train_dataloader = dict(dataset=dict(transform=images, **data))
val_dataloader = dict(dataset=dict(transform=images, **data))
test_dataloader = val_dataloader
del data, images
