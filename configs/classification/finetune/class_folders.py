# Your own images: data/mine/{train,val}/CLASS/*.jpg. docs/how-to/own-data.md says what to change.
# Without a third folder val is tested too, so that the best checkpoint is the best of these images:
# report the last one, or let dev_size hold images out of train, as imagenette.py does.
_base_ = ['_base_.py', '../../_base_/datasets/imagenet.py']
model = dict(img_size=224, num_classes=3)
data = dict(data_root='data/mine', dev_size=0)
total_batch_size = 64
train_dataloader = dict(batch_size=64, num_workers=4, dataset=data)
val_dataloader = dict(batch_size=64, num_workers=4, dataset=dict(split='val', **data))
test_dataloader = val_dataloader
# 5e-4 for 256 images
optim_wrapper = dict(optimizer=dict(lr=1.25e-4))
del data
