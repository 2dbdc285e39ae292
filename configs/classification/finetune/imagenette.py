# Imagenette, ten classes of ImageNet (github.com/fastai/imagenette), from its images of 160 pixels.
_base_ = 'class_folders.py'
model = dict(num_classes=10)
data = dict(data_root='data/imagenette2-160', dev_size=500)
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=dict(split='dev', **data))
test_dataloader = dict(dataset=dict(split='test', **data))
del data
