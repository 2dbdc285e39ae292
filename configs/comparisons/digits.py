# Two rows at two seeds on the scans of digits that scikit-learn has: a minute each, and no data to
# fetch. It shows what comparisons do, and decides nothing.
config = 'vqmoe_vision::classification/digits/demo/vit_tiny_vqmoe_demo.py'
metric = 'accuracy/top1'
reference = 'dense_1x'
seeds = [1, 2]
rows = dict(dense_1x='dense_1x', smoe='smoe')
contrasts = ['smoe - dense_1x']
margin = 1.0
options = [
    'train_cfg.max_epochs=10',
    'param_scheduler.1.end=10',
    'param_scheduler.1.T_max=8',
    'default_hooks.checkpoint.interval=1',
]
