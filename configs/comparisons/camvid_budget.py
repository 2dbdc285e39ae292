# 2,400 iterations of CamVid on a CPU, compute matched: docs/compare.md.
config = 'configs/segmentation/camvid_budget.py'
metric = 'mIoU'
reference = 'dense_wide'
seeds = [1, 2, 3, 4, 5]
all_methods = True
all_presets = True
controls = ['smoe_frozen', 'hashmoe']
rows = dict(
    vqmoe_token='vqmoe model.backbone.moe.expert_input=token',
    vqmoe_official_input='vqmoe model.backbone.moe.expert_input=official',
    vqmoe_ste='vqmoe model.backbone.moe.expert_input=ste',
    vqmoe_discrete='vqmoe model.backbone.moe.form=discrete',
    vqmoe_continuous='vqmoe model.backbone.moe.form=continuous',
    vqmoe_32_codes='vqmoe model.backbone.moe.num_codes=32',
)
options = [
    'train_cfg.max_iters=2400',
    'train_cfg.val_interval=300',
    'param_scheduler.1.end=2400',
    'default_hooks.checkpoint.interval=300',
]
shifts = {
    'scale 0.5': 'test_dataloader.dataset.pipeline.1.scale_factor=0.5',
    'scale 1.0': 'test_dataloader.dataset.pipeline.1.scale_factor=1.0',
    'window 256': 'model.test_cfg.crop_size="(256, 256)" model.test_cfg.stride="(192, 192)"',
    'corruptions 3': 'test_dataloader.dataset.pipeline.0.shift={corruption}_3',
}
