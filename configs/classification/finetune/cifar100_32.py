# At 32 pixels: the stem is resized to patches of 4, and positions to a grid of 8x8.
_base_ = ['_base_.py', '../../_base_/datasets/cifar100.py']
model = dict(img_size=32, patch_size=4, num_classes=100)
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=1.0)))
test_dataloader = val_dataloader
