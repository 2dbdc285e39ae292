# The primary contrasts on Imagenette in six epochs at 160 pixels: photographs of 64 tokens. Rows,
# contrasts and margin are those of cifar100, named before the first run. The data are a copy of
# squares of 224 pixels: docs/how-to/data.md.
_base_ = 'cifar100.py'
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
