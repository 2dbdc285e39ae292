# 40 epochs of CIFAR-10 on a CPU, 18 to 65 minutes a run: docs/how-to/compare.md.
config = 'vqmoe_vision::classification/cifar10_budget.py'
metric = 'accuracy/top1'
reference = 'dense_1x'
seeds = [1, 2, 3]
rows = dict(
    dense_1x='dense_1x',
    smoe='smoe',
    vqmoe_ema='vqmoe_ema',
    dense_2x='dense_2x',
    smoe_frozen='smoe_frozen',
    position='position',
)
# named when the runs were there
contrasts = ['smoe - smoe_frozen', 'vqmoe_ema - smoe', 'smoe - dense_2x', 'vqmoe_ema - dense_2x']
margin = 1.0
options = ['train_cfg.max_epochs=40', 'param_scheduler.1.end=40', 'param_scheduler.1.T_max=39']
# what docs/evidence/findings.md shows: tools/compare.py table --images docs/images
images = {'curves': 'cifar10-long-curves'}
