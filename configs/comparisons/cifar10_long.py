# 40 epochs of CIFAR-10 on a CPU, about an hour a run: docs/compare.md.
config = 'configs/classification/cifar10_budget.py'
metric = 'accuracy/top1'
reference = 'dense'
seeds = [1, 2, 3]
rows = dict(
    dense='dense',
    smoe='smoe',
    vqmoe='vqmoe',
    dense_wide='dense_wide',
    smoe_frozen='smoe_frozen',
    hashmoe='hashmoe',
)
controls = ['smoe_frozen', 'hashmoe']
options = ['train_cfg.max_epochs=40', 'param_scheduler.1.end=40', 'param_scheduler.1.T_max=39']
