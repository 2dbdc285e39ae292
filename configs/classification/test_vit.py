# Twelve epochs of CIFAR-10 with Muon: 50 minutes on a core of a CPU. Dense with
# model.model_name=test_vit_dense model.moe=None. Both come with the package.
_base_ = 'cifar10_budget.py'
model = dict(
    _delete_=True,
    type='Classifier',
    model_name='test_vit_vqmoe',
    moe=dict(preset='ema'),
    num_classes=10,
)
optim_wrapper = dict(
    type='CpuAmpOptimWrapper',
    optimizer=dict(_delete_=True, type='timm.optim.muon.Muon', lr=0.005, weight_decay=0.01),
)
train_cfg = dict(max_epochs=12)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, end=1, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR', begin=1, end=12, T_max=11, eta_min=0, convert_to_iter_based=True
    ),
]
