# 2,400 iterations of CamVid on a CPU, from scratch, compute matched. Seeds differ by several
# points, so that few rows are worth their time; each method starts from a trained dense model in
# camvid_pretrained, where pairs share more. docs/how-to/compare.md
config = 'vqmoe_vision::segmentation/segmenter_vit-4x128-vqmoe_mask_1xb8-600_camvid-192x192.py'
metric = 'mIoU'
reference = 'dense_2x'
seeds = [1, 2, 3, 4, 5]
# named when the runs were there
contrasts = ['smoe - smoe_frozen', 'vqmoe_ema - smoe', 'smoe - dense_2x', 'vqmoe_ema - dense_2x']
margin = 1.0
rows = dict(
    dense_1x='dense_1x',
    dense_2x='dense_2x',
    smoe='smoe',
    vqmoe_ema='vqmoe_ema',
    vqmoe='vqmoe',
    smoe_frozen='smoe_frozen',
    position='position',
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
