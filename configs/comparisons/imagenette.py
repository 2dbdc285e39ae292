# The primary contrasts on Imagenette in six epochs at 160 pixels: photographs of 64 tokens.
# The data are a copy of squares of 224 pixels: docs/how-to/data.md.
config = 'configs/classification/cifar10_budget.py'
metric = 'accuracy/top1'
also = ['accuracy/top5']
reference = 'dense_2x'
seeds = [1, 2, 3, 4, 5]
# primary, named before the first run; every other difference is exploratory
contrasts = [
    'smoe - smoe_frozen',
    'vqmoe_paper - smoe',
    'vqmoe - smoe',
    'smoe - dense_2x',
]
margin = 1.0
rows = dict(
    dense_2x='dense_2x',
    smoe='smoe',
    smoe_frozen='smoe_frozen',
    vqmoe='vqmoe',
    vqmoe_paper='vqmoe_paper',
    vqmoe_official='vqmoe_official',
    position='position',
)
options = [
    'model.img_size=160',
    'model.patch_size=20',
    'total_batch_size=64',
    'train_dataloader.dataset.transform.padding=20',
    'train_cfg.max_epochs=6',
    'param_scheduler.1.end=6',
    'param_scheduler.1.T_max=5',
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
