# Images are enlarged to the size of the weights, and tests see all of them. At 32 pixels: as
# cifar10_224.py says.
_base_ = ['_base_.py', '../../_base_/datasets/cifar100.py']
model = dict(img_size=224, num_classes=100)
train_dataloader = dict(dataset=dict(transform=dict(input_size=224)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=224, crop_pct=1.0)))
test_dataloader = val_dataloader
