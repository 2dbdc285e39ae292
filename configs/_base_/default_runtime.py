# Shared by classification and segmentation; a task adds its own custom_imports.
default_scope = 'mmengine'
randomness = dict(seed=42)
env_cfg = dict(cudnn_benchmark=True, dist_cfg=dict(backend='nccl'))
# The data loader's order comes from the sampler's seed and the epoch, all other random numbers
# from ReseedHook: a resumed run equals one that was never interrupted.
custom_hooks = [
    dict(type='ReseedHook'),
    dict(type='CheckpointFitHook'),
    dict(type='NonFiniteGuardHook'),
    dict(type='MoeStateHook'),
    dict(type='ClassCountHook'),
]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50),
    runtime_info=dict(type='StepValuesHook'),
    checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=1, save_best='auto'),
    routing_picture=dict(type='RoutingPictureHook'),
)
log_processor = dict(type='MoeLogProcessor', window_size=10)
visualizer = dict(
    type='Visualizer',
    vis_backends=[dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')],
)
