# Images are enlarged to the size of the weights, and tests see all of them. At 32 pixels, with
# positions on a grid of 8x8: model.img_size=32 model.patch_size=4, and 32 for the input_size of the
# transforms.
_base_ = ['_base_.py', '../../_base_/datasets/cifar10.py']
model = dict(img_size=224, num_classes=10)
train_dataloader = dict(dataset=dict(transform=dict(input_size=224)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=224, crop_pct=1.0)))
test_dataloader = val_dataloader
