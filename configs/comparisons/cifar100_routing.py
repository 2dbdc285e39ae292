# Four epochs of CIFAR-100, where cifar100_budget has six: token choice as of 2026: sigmoid scores and a bias
# that evens loads, a shared expert, gated MLPs, a router that a dense model teaches. All contrasts
# were named before the first run.
config = 'configs/classification/cifar10_budget.py'
metric = 'accuracy/top1'
also = ['accuracy/top5']
reference = 'smoe'
start = 'configs/comparisons/cifar100_routing.py dense_1x epoch_4.pth'
seeds = [1, 2, 3, 4, 5]
contrasts = [
    'smoe_sigmoid - smoe',
    'smoe_shared - smoe',
    'smoe_gated - smoe',
    'tgrmoe - smoe',
]
margin = 1.0
rows = dict(
    dense_1x='dense_1x',
    smoe='smoe',
    smoe_sigmoid='smoe_sigmoid',
    smoe_shared='smoe_shared',
    # in all blocks, with the multiply-accumulates of plain ones
    smoe_gated='smoe model.mlp_layer=SwiGLU model.mlp_ratio=2.6875',
    tgrmoe='tgrmoe model.features={start}',
)
options = [
    'model.num_classes=100',
    'train_cfg.max_epochs=4',
    'param_scheduler.1.end=4',
    'param_scheduler.1.T_max=3',
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
