# Nearer to convergence: CIFAR-10 in patches of 4, with Muon in bfloat16 and eight epochs.
config = 'vqmoe_vision::classification/cifar10_budget.py'
metric = 'accuracy/top1'
reference = 'dense_2x'
seeds = [1, 2, 3, 4]
# primary, named before the first run; every other difference is exploratory
contrasts = ['smoe - smoe_frozen', 'vqmoe_ema - smoe', 'smoe - dense_2x', 'vqmoe_ema - dense_2x']
margin = 1.0
names = ('dense_2x', 'smoe_frozen', 'smoe', 'vqmoe_ema')
rows = {name: name for name in names}
del names
options = [
    'model.patch_size=4',
    'optim_wrapper.type=CpuAmpOptimWrapper',
    'optim_wrapper.optimizer._delete_=True',
    'optim_wrapper.optimizer.type=timm.optim.muon.Muon',
    'optim_wrapper.optimizer.lr=0.005',
    'optim_wrapper.optimizer.weight_decay=0.01',
    'train_cfg.max_epochs=8',
    'param_scheduler.1.end=8',
    'param_scheduler.1.T_max=7',
]
