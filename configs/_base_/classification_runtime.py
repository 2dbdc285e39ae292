_base_ = 'default_runtime.py'
custom_imports = dict(imports=['vqmoe_vision.classification'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(save_best='accuracy/top1', rule='greater'))
val_cfg = dict()
test_cfg = dict()
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = dict(type='Accuracy', topk=(1, 5))
