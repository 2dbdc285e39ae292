# What six epochs of CIFAR-10 are worth on CamVid: dense, each method and the controls, made of the
# dense checkpoint of cifar10_budget, and VQMoE from its own, with both branches, with the discrete
# one alone, and with its codes fixed. A dense model of matched width cannot start from the dense
# one, and begins from nothing as dense does. docs/how-to/compare.md
config = 'vqmoe_vision::segmentation/segmenter_vit-4x128-vqmoe_mask_1xb8-600_camvid-192x192.py'
metric = 'mIoU'
reference = 'dense_1x_started'
seeds = [1, 2, 3, 4, 5]
start = 'vqmoe_vision::comparisons/cifar10_budget.py dense_1x epoch_6.pth'
all_started = True
# named when the runs were there
contrasts = [
    'smoe_started - smoe_frozen_started',
    'vqmoe_ema_started - smoe_started',
    'smoe_started - dense_1x_started',
]
margin = 1.0
rows = dict(
    dense_1x='dense_1x',
    dense_2x='dense_2x',
    smoe_frozen_started='smoe_frozen model.backbone.checkpoint={start}',
    vqmoe_ema_started='vqmoe_ema model.backbone.checkpoint={start}',
    vqmoe_ema_full='vqmoe_ema model.backbone.checkpoint={start:vqmoe_ema}',
    vqmoe_ema_discrete=(
        'vqmoe_ema model.backbone.checkpoint={start:vqmoe_ema} model.backbone.moe.form=discrete'
    ),
    vqmoe_ema_frozen_codes=(
        'vqmoe_ema model.backbone.checkpoint={start:vqmoe_ema} model.backbone.moe.form=discrete '
        'model.backbone.moe.train_codebook=False'
    ),
)
# the mean and deviation of the weights; and half the iterations of camvid_budget
options = [
    'model.data_preprocessor.mean=[125.307,122.961,113.8575]',
    'model.data_preprocessor.std=[51.5865,50.847,51.255]',
    'train_cfg.max_iters=1200',
    'train_cfg.val_interval=300',
    'param_scheduler.1.end=1200',
    'default_hooks.checkpoint.interval=300',
]
