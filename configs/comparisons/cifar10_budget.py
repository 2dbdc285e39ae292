# Six epochs of CIFAR-10 on a CPU, compute matched: docs/how-to/compare.md.
config = 'vqmoe_vision::classification/cifar10_budget.py'
metric = 'accuracy/top1'
reference = 'dense_2x'
seeds = [1, 2, 3, 4, 5]
all_methods = True
all_presets = True
# named when the runs were there
contrasts = ['smoe - smoe_frozen', 'vqmoe_ema - smoe', 'vqmoe_paper - smoe', 'smoe - dense_2x']
margin = 1.0
rows = dict(
    vqmoe_ema_token='vqmoe_ema model.moe.expert_input=token',
    vqmoe_ema_official_input='vqmoe_ema model.moe.expert_input=official',
    vqmoe_ema_ste='vqmoe_ema model.moe.expert_input=ste',
    vqmoe_ema_discrete='vqmoe_ema model.moe.form=discrete',
    vqmoe_ema_continuous='vqmoe_ema model.moe.form=continuous',
    vqmoe_ema_32_codes='vqmoe_ema model.moe.num_codes=32',
    # its slots mix all tokens almost evenly to the end; from the root of the width they need not
    softmoe_scale_11='softmoe model.moe.init_scale=11.0',
)
# for tools/analyze.py: a checkpoint of every epoch, and what the routing did
options = [
    'default_hooks.checkpoint.max_keep_ckpts=6',
    'default_hooks.routing_history.type=RoutingHistoryHook',
]
shifts = {
    'corruptions 1': 'test_dataloader.dataset.transform.shift={corruption}_1',
    'corruptions 3': 'test_dataloader.dataset.transform.shift={corruption}_3',
    'corruptions 5': 'test_dataloader.dataset.transform.shift={corruption}_5',
    'scale 1.25': 'test_dataloader.dataset.transform.crop_pct=0.8',
}
# what docs/archive shows: tools/compare.py table --images docs/images
images = {
    'shifts': 'findings-shifts',
    'differences': 'findings-differences',
}
