# Codebooks on a long tail: 24 epochs of CIFAR-10-LT at imbalance 100, as many updates as
# cifar10_budget has in six, at half its width: a run takes five to eight minutes of a core. Rows
# are codebooks, so that the reference is one; dense and the controls say what any of them is worth.
# docs/how-to/compare.md
config = 'vqmoe_vision::classification/cifar10_budget.py'
metric = 'accuracy/top1'
also = ['accuracy/head', 'accuracy/medium', 'accuracy/tail', 'code_usage_unused']
reference = 'ema'
seeds = [1, 2, 3, 4, 5]
rows = dict(
    ema='vqmoe_ema',
    ema_warmup='vqmoe_ema model.moe.ema_decay_warmup=True',
    cosine='vqmoe_ema model.moe.use_cosine_sim=True',
    gradient='vqmoe_ema model.moe.codebook=gradient',
    cvq='vqmoe_ema model.moe.codebook=cvq',
    simvq='vqmoe_ema model.moe.codebook=simvq',
    plain='vqmoe_ema model.moe.codebook=plain',
    # the code itself is fed to the expert: how its gradient is made decides most there
    ste='vqmoe_ema model.moe.expert_input=ste',
    rotation='vqmoe_ema model.moe.expert_input=ste model.moe.rotation_trick=True',
    dense_1x='dense_1x',
    dense_2x='dense_2x',
    smoe_frozen='smoe_frozen',
    position='position',
)
# named when the runs were there
contrasts = ['ema - smoe_frozen', 'ema - dense_2x']
margin = 1.0
options = [
    'model.embed_dim=64',
    'model.num_heads=2',
    'train_dataloader.dataset.imbalance=100',
    'val_dataloader.dataset.imbalance=100',
    'test_dataloader.dataset.imbalance=100',
    'train_cfg.max_epochs=24',
    'train_cfg.val_interval=4',
    'param_scheduler.1.end=24',
    'param_scheduler.1.T_max=23',
]
