# Segmenter-Small from ImageNet, as all published results on ADE20K: the weights are those that
# mmsegmentation converts for its own (configs/segmenter/README.md), and so is the schedule. Experts
# are made of the MLPs of two blocks; model.backbone.moe=None is the dense row.
_base_ = '_base_.py'
model = dict(
    backbone=dict(
        model_name='vit_small_patch16_384.augreg_in21k_ft_in1k',
        pretrained=True,
        moe=dict(method='vqmoe'),
    )
)
