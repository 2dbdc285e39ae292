# The primary contrasts on CIFAR-100 in four epochs, with the paper's VQMoE and the released one.
config = 'vqmoe_vision::classification/cifar10_budget.py'
metric = 'accuracy/top1'
also = ['accuracy/top5']
reference = 'dense_2x'
seeds = [1, 2, 3, 4, 5]
# primary, named before the first run; every other difference is exploratory
contrasts = [
    'smoe - smoe_frozen',
    'vqmoe_paper - smoe',
    'vqmoe_ema - smoe',
    'smoe - dense_2x',
]
margin = 1.0
rows = dict(
    dense_2x='dense_2x',
    smoe='smoe',
    smoe_frozen='smoe_frozen',
    vqmoe_ema='vqmoe_ema',
    vqmoe='vqmoe',
    vqmoe_paper='vqmoe_paper',
    vqmoe_official='vqmoe_official',
    position='position',
)
options = [
    'model.num_classes=100',
    *(
        f'{split}_dataloader.dataset.{field}'
        for split in ('train', 'val', 'test')
        for field in (
            'type=cifar100',
            'data_root=data/cifar100',
            'transform.mean="(0.5071, 0.4865, 0.4409)"',
            'transform.std="(0.2673, 0.2564, 0.2762)"',
        )
    ),
    'train_cfg.max_epochs=4',
    'param_scheduler.1.end=4',
    'param_scheduler.1.T_max=3',
]
