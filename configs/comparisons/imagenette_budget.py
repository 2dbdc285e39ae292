# Twelve epochs of Imagenette, ten classes of ImageNet, at 160 pixels: photographs, and 64 tokens an
# image where cifar10_budget has 16. Batches are half as large, as there are a fifth of the images;
# crops move by up to an eighth, as there, so that a test looks at the scale of training. The data
# are a copy of squares of 224 pixels: docs/how-to/data.md.
config = 'configs/classification/cifar10_budget.py'
metric = 'accuracy/top1'
also = ['accuracy/top5']
reference = 'dense_2x'
seeds = [1, 2, 3, 4, 5]
# named when the runs were there
contrasts = ['smoe - smoe_frozen', 'vqmoe - smoe', 'smoe - dense_2x', 'vqmoe - dense_2x']
margin = 1.0
rows = dict(
    dense_1x='dense_1x',
    dense_2x='dense_2x',
    smoe='smoe',
    vqmoe='vqmoe',
    smoe_frozen='smoe_frozen',
    position='position',
)
options = [
    'model.img_size=160',
    'model.patch_size=20',
    'train_dataloader.batch_size=64',
    'train_dataloader.dataset.transform.padding=20',
    'train_cfg.max_epochs=12',
    'param_scheduler.1.end=12',
    'param_scheduler.1.T_max=11',
    *(
        f'{split}_dataloader.dataset.{field}'
        for split in ('train', 'val', 'test')
        for field in (
            'type=class_folder',
            'data_root=data/imagenette-224',
            'dev_size=500',
            'transform.input_size=160',
            'transform.mean="(0.485, 0.456, 0.406)"',
            'transform.std="(0.229, 0.224, 0.225)"',
        )
    ),
]
