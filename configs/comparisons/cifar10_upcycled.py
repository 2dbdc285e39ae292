# Six epochs of CIFAR-10 more for the dense ViT of cifar10_budget: as it is, with each method's
# experts made of its MLPs, and each method from scratch. docs/how-to/compare.md
config = 'vqmoe_vision::classification/cifar10_budget.py'
metric = 'accuracy/top1'
reference = 'dense_1x_started'
seeds = [1, 2, 3, 4, 5]
start = 'vqmoe_vision::comparisons/cifar10_budget.py dense_1x epoch_6.pth'
all_started = True
all_methods = True
# named when the runs were there
contrasts = [
    'smoe_started - smoe_frozen_started',
    'vqmoe_ema_started - smoe_started',
    'smoe_started - dense_longer',
]
margin = 1.0
rows = dict(
    smoe_frozen='smoe_frozen',
    smoe_frozen_started='smoe_frozen model.checkpoint={start}',
    smoe_exact='smoe model.checkpoint={start} model.moe.renormalize=True',
    smoe_frozen_exact='smoe_frozen model.checkpoint={start} model.moe.renormalize=True',
    vqmoe_ema='vqmoe_ema',
    vqmoe_ema_started='vqmoe_ema model.checkpoint={start}',
    vqmoe_ema_discrete='vqmoe_ema model.checkpoint={start} model.moe.form=discrete',
    vqmoe_ema_drop='vqmoe_ema model.checkpoint={start} model.upcycling.drop=0.5',
    # The upcycled rows have 17.5 million multiply-accumulates and go on for six epochs; the dense
    # model has 13.2 million, so that eight epochs cost it as much: what that compute is worth
    # without experts.
    dense_longer=(
        'dense_1x model.checkpoint={start} train_cfg.max_epochs=8 param_scheduler.1.end=8 '
        'param_scheduler.1.T_max=7'
    ),
)
# what docs/archive shows: tools/compare.py table --images docs/images
images = {'curves': 'cifar10-upcycled-curves'}
highlighted = [
    'dense_1x',
    'dense_1x_started',
    'dense_longer',
    'position',
    'position_started',
    'smoe',
    'smoe_started',
    'vqmoe_ema',
    'vqmoe_ema_started',
    'smoe_frozen_started',
    'mocle',
]
