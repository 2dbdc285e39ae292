# Which options are worth five fresh seeds: two seeds that no table has, on the 5,000 images that
# are held out of CIFAR-10's training set. Each trial changes one thing of the row of its method.
# VQMoE has twenty-four trials, and so has SMoE, with which it is compared. What is found here is
# said of these two; trials of other methods are in cifar10_methods.py. docs/how-to/compare.md
config = 'vqmoe_vision::classification/cifar10_budget.py'
stage = 'dev'
metric = 'accuracy/top1'
also = ['code_usage_unused', 'quantization_error']
reference = 'vqmoe_ema'
seeds = [11, 12]
rows = dict(
    vqmoe_ema='vqmoe_ema',
    smoe='smoe',
    dense_1x='dense_1x',
    vqmoe_ema_decay_90='vqmoe_ema model.moe.ema_decay=0.9',
    vqmoe_ema_decay_warmup='vqmoe_ema model.moe.ema_decay_warmup=True',
    vqmoe_ema_revival_10='vqmoe_ema model.moe.dead_code_threshold=0.1',
    vqmoe_ema_token='vqmoe_ema model.moe.expert_input=token',
    vqmoe_ema_bias_correction='vqmoe_ema model.moe.ema_bias_correction=True',
    vqmoe_ema_kmeans_usage='vqmoe_ema model.moe.usage_from_kmeans=True',
    vqmoe_ema_no_input_norm='vqmoe_ema model.moe.input_norm=False',
    vqmoe_ema_output_norm='vqmoe_ema model.moe.output_norm=True',
    vqmoe_ema_layers_23='vqmoe_ema model.moe.moe_layers="(2, 3)"',
    vqmoe_ema_32_codes='vqmoe_ema model.moe.num_codes=32',
    vqmoe_ema_code_share_30='vqmoe_ema model.moe.code_share=0.3',
    vqmoe_ema_router_scale='vqmoe_ema model.moe.routed_scaling_factor=2.75',
    vqmoe_ema_diversity_10='vqmoe_ema model.moe.diversity_weight=0.1',
    vqmoe_ema_balance_10='vqmoe_ema model.moe.balance_weight=0.1',
    vqmoe_ema_vq_weight_1='vqmoe_ema model.moe.vq_weight=1.0',
    vqmoe_ema_vq_weight_tenth='vqmoe_ema model.moe.vq_weight=0.008',
    # a router that is frozen has no balance to learn, and takes no loss of it
    vqmoe_ema_frozen_router='vqmoe_ema model.moe.train_router=False model.moe.balance_weight=0.0',
    vqmoe_ema_16_experts='vqmoe_ema model.moe.num_experts=16',
    vqmoe_ema_balance_0='vqmoe_ema model.moe.balance_weight=0.0',
    vqmoe_ema_commitment_1='vqmoe_ema model.moe.commitment=1.0',
    vqmoe_ema_revival_50='vqmoe_ema model.moe.dead_code_threshold=0.5',
    vqmoe_ema_rotation='vqmoe_ema model.moe.rotation_trick=True',
    vqmoe_ema_router_lr_10='vqmoe_ema optim_wrapper.paramwise_cfg.custom_keys.router.lr_mult=10',
    smoe_router_lr_10='smoe optim_wrapper.paramwise_cfg.custom_keys.router.lr_mult=10',
    vqmoe_ema_router_decay_0=(
        'vqmoe_ema optim_wrapper.paramwise_cfg.custom_keys.router.decay_mult=0'
    ),
    smoe_router_decay_0='smoe optim_wrapper.paramwise_cfg.custom_keys.router.decay_mult=0',
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
    smoe_noise_50='smoe model.moe.router_noise=0.5',
    smoe_start_300='smoe model.moe.router_init_scale=3.0',
    smoe_16_experts='smoe model.moe.num_experts=16',
    smoe_32_experts='smoe model.moe.num_experts=32',
    smoe_load_0='smoe model.moe.load_weight=0.0',
    smoe_importance_0='smoe model.moe.importance_weight=0.0',
    smoe_z_tenfold='smoe model.moe.z_weight=0.01',
    smoe_capacity_200='smoe model.moe.capacity_factor=2.0',
)
