# A ViT-S/16 of ImageNet-21k learns another data set, with experts made of its MLPs. The recipe is
# that of MAE's ViT-Base (facebookresearch/mae, FINETUNE.md and the defaults of main_finetune.py):
# AdamW with layer-wise decay of 0.65, a rate of 5e-4 for 256 images, 5 epochs of warm-up, a cosine
# to 1e-6, weight decay 0.05, drop path 0.1, mixup 0.8, cutmix 1.0, label smoothing 0.1, and the
# augmentation of _base_/datasets/recipe.py. Three differences: 30 epochs in place of 100, as BEiT
# has from supervised weights (microsoft/unilm, beit/get_started_for_image_classification.md), the
# class token is read in place of the mean, as these weights have learned it, and gradients are
# clipped, as everywhere here. Nothing was tuned for these data sets.
_base_ = ['../../_base_/models/vit.py', '../../_base_/classification_runtime.py']
model = dict(
    model_name='vit_small_patch16_224.augreg_in21k_ft_in1k',
    pretrained=True,
    moe=dict(method='vqmoe'),
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0),
    label_smoothing=0.1,
)
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(layer_decay=0.65),
)
train_cfg = dict(type='ResumableEpochLoop', max_epochs=30)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, end=5, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        begin=5,
        end=30,
        T_max=25,
        eta_min=1e-6,
        convert_to_iter_based=True,
    ),
]
