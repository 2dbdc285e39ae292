# Six epochs of CIFAR-100, as cifar10_budget: whether what it says holds for other classes. Rows of
# parts of VQMoE were added once the others had shown it below SMoE: what of it costs that.
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
    vqmoe_token='vqmoe model.moe.expert_input=token',
    vqmoe_discrete='vqmoe model.moe.form=discrete',
    vqmoe_continuous='vqmoe model.moe.form=continuous',
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
]
