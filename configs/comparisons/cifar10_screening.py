# Which options are worth five fresh seeds: two seeds that no table has, on the 5,000 images that
# are held out of CIFAR-10's training set. Each trial changes one thing of the row of its method.
# VQMoE, SMoE, XMoE and StableMoE have fourteen trials each; expert choice, SoftMoE and hash routing
# have fewer options, of which each is tried; MoCLE needs a dense model first. docs/compare.md
config = 'configs/classification/cifar10_budget.py'
stage = 'dev'
metric = 'accuracy/top1'
also = ['code_usage_unused', 'quantization_error']
reference = 'vqmoe'
seeds = [11, 12]
all_methods = True
rows = dict(
    vqmoe_decay_90='vqmoe model.moe.ema_decay=0.9',
    vqmoe_decay_warmup='vqmoe model.moe.ema_decay_warmup=True',
    vqmoe_revival_10='vqmoe model.moe.dead_code_threshold=0.1',
    vqmoe_token='vqmoe model.moe.expert_input=token',
    vqmoe_bias_correction='vqmoe model.moe.ema_bias_correction=True',
    vqmoe_kmeans_usage='vqmoe model.moe.usage_from_kmeans=True',
    vqmoe_no_input_norm='vqmoe model.moe.input_norm=False',
    vqmoe_output_norm='vqmoe model.moe.output_norm=True',
    vqmoe_layers_23='vqmoe model.moe.moe_layers="(2, 3)"',
    vqmoe_32_codes='vqmoe model.moe.num_codes=32',
    vqmoe_code_share_30='vqmoe model.moe.code_share=0.3',
    vqmoe_router_scale='vqmoe model.moe.routed_scaling_factor=2.75',
    vqmoe_diversity_10='vqmoe model.moe.diversity_weight=0.1',
    vqmoe_balance_10='vqmoe model.moe.balance_weight=0.1',
    smoe_top_1='smoe model.moe.top_k=1',
    smoe_renormalize='smoe model.moe.renormalize=True',
    smoe_bias='smoe model.moe.router_bias=True',
    smoe_noise_0='smoe model.moe.router_noise=0.0 model.moe.load_weight=0.0',
    smoe_start_10='smoe model.moe.router_init_scale=0.1',
    smoe_noise_200='smoe model.moe.router_noise=2.0',
    smoe_balance_0='smoe model.moe.importance_weight=0.0 model.moe.load_weight=0.0',
    smoe_balance_tenth='smoe model.moe.importance_weight=5e-4 model.moe.load_weight=5e-4',
    smoe_balance_tenfold='smoe model.moe.importance_weight=0.05 model.moe.load_weight=0.05',
    smoe_balance_switch=(
        'smoe model.moe.importance_weight=0.0 model.moe.load_weight=0.0 '
        'model.moe.balance_weight=0.01'
    ),
    smoe_z='smoe model.moe.z_weight=0.001',
    smoe_capacity='smoe model.moe.capacity_factor=1.25',
    smoe_prioritized='smoe model.moe.capacity_factor=1.25 model.moe.batch_prioritized=True',
    smoe_layers_23='smoe model.moe.moe_layers="(2, 3)"',
    xmoe_top_1='xmoe model.moe.top_k=1',
    xmoe_renormalize='xmoe model.moe.renormalize=True',
    xmoe_sigmoid='xmoe model.moe.gate=sigmoid',
    xmoe_dim_8='xmoe model.moe.router_dim=8',
    xmoe_dim_16='xmoe model.moe.router_dim=16',
    xmoe_raw_tokens='xmoe model.moe.normalize_tokens=False',
    xmoe_temperature_10='xmoe model.moe.temperature=0.1',
    xmoe_temperature_100='xmoe model.moe.temperature=1.0',
    xmoe_temperature_fixed='xmoe model.moe.learn_temperature=False',
    xmoe_balance_0='xmoe model.moe.balance_weight=0.0',
    xmoe_balance_tenth='xmoe model.moe.balance_weight=0.001',
    xmoe_balance_tenfold='xmoe model.moe.balance_weight=0.1',
    xmoe_balance_soft='xmoe model.moe.balance_temperature=1.0',
    xmoe_layers_23='xmoe model.moe.moe_layers="(2, 3)"',
    stablemoe_top_1='stablemoe model.moe.top_k=1',
    stablemoe_one_stage='stablemoe model.moe.two_stage=False',
    stablemoe_stage_5='stablemoe model.moe.stage1_fraction=0.05',
    stablemoe_stage_25='stablemoe model.moe.stage1_fraction=0.25',
    stablemoe_stage_50='stablemoe model.moe.stage1_fraction=0.5',
    stablemoe_stage_100='stablemoe model.moe.stage1_fraction=1.0',
    stablemoe_balance_0='stablemoe model.moe.balance_weight=0.0',
    stablemoe_balance_tenth='stablemoe model.moe.balance_weight=0.03',
    stablemoe_balance_third='stablemoe model.moe.balance_weight=0.1',
    stablemoe_balance_threefold='stablemoe model.moe.balance_weight=1.0',
    stablemoe_distill_10='stablemoe model.moe.distill_weight=0.1',
    stablemoe_distill_30='stablemoe model.moe.distill_weight=0.3',
    stablemoe_distill_300='stablemoe model.moe.distill_weight=3.0',
    stablemoe_layers_23='stablemoe model.moe.moe_layers="(2, 3)"',
    ecmoe_capacity_1='ecmoe model.moe.capacity_factor=1.0',
    ecmoe_layers_23='ecmoe model.moe.moe_layers="(2, 3)"',
    softmoe_rms='softmoe model.moe.slot_norm=rms',
    softmoe_slots_1='softmoe model.moe.slots_per_token=1.0',
    softmoe_layers_23='softmoe model.moe.moe_layers="(2, 3)"',
    hashmoe_top_1='hashmoe model.moe.top_k=1',
    hashmoe_layers_23='hashmoe model.moe.moe_layers="(2, 3)"',
)
