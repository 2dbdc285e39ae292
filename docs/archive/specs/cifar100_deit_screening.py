# The learning rate and the length of cifar100_deit.py, on 2,000 training images that it does not
# train on, at a seed that it does not have: four trials for each of four rows.
_base_ = '../../../configs/comparisons/cifar100_deit.py'
stage = 'dev'
reference = 'dense_1x_3e4'
seeds = [11]
contrasts = []
starts = dict(
    dense_1x='dense_1x',
    smoe='smoe model.moe.renormalize=True',
    smoe_frozen='smoe_frozen model.moe.renormalize=True',
    vqmoe=(
        'vqmoe model.moe.codebook=projected model.moe.code_dim=24 '
        'model.moe.routed_scaling_factor=4.0 model.moe.router_drop=0.3'
    ),
)
short = 'train_cfg.max_epochs=3 param_scheduler.1.end=3 param_scheduler.1.T_max=2'
trials = {
    '1e4': f'optim_wrapper.optimizer.lr=1e-4 {short}',
    '3e4': f'optim_wrapper.optimizer.lr=3e-4 {short}',
    '10e4': f'optim_wrapper.optimizer.lr=1e-3 {short}',
    'long': 'optim_wrapper.optimizer.lr=3e-4',
}
rows = dict(
    _delete_=True,
    **{f'{row}_{trial}': f'{starts[row]} {trials[trial]}' for row in starts for trial in trials},
)
del starts, trials, short
