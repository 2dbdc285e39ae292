# Runs are counted in iterations; data sets come with their own pipelines.
_base_ = 'default_runtime.py'
default_scope = 'mmseg'
custom_imports = dict(imports=['vqmoe_vision.segmentation'], allow_failed_imports=False)
default_hooks = dict(
    # validation at its iteration in TensorBoard: such a run has one epoch
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=16000, save_best='mIoU', rule='greater'),
    visualization=dict(type='OverlayHook'),
)
log_processor = dict(by_epoch=False)
visualizer = dict(type='OverlayVisualizer')
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
val_evaluator = dict(type='CheckedIoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
tta_model = dict(type='SegTTAModel')
