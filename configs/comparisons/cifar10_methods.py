# Trials of the methods that VQMoE's paper is compared with, beside those of SMoE in
# cifar10_screening.py: on the same held-out images of CIFAR-10, at the same two seeds. Every option
# that is a method's own is there, as far as one process has use for it and no other says the same
# in another unit, and all three methods have twelve trials. What an option decides elsewhere goes
# with it: XMoE's router is half as wide as there are experts, and each form of its gate has its own
# temperatures. Expert choice and hash routing have one option of their own each, and six and three
# trials. MoCLE, which needs a dense model of these images, has none. docs/how-to/compare.md
config = 'vqmoe_vision::classification/cifar10_budget.py'
stage = 'dev'
metric = 'accuracy/top1'
reference = 'xmoe'
seeds = [11, 12]
rows = dict(
    xmoe='xmoe',
    stablemoe='stablemoe',
    softmoe='softmoe',
    ecmoe='ecmoe',
    position='position',
    xmoe_top_1='xmoe model.moe.top_k=1',
    xmoe_renormalize='xmoe model.moe.renormalize=True',
    xmoe_sigmoid='xmoe model.moe.gate=sigmoid',
    xmoe_width_8='xmoe model.moe.router_dim=8',
    xmoe_temperature_100='xmoe model.moe.temperature=1.0',
    xmoe_temperature_10='xmoe model.moe.temperature=0.1',
    xmoe_fixed_temperature='xmoe model.moe.learn_temperature=False',
    xmoe_balance_temperature_100='xmoe model.moe.balance_temperature=1.0',
    xmoe_token_length='xmoe model.moe.normalize_tokens=False',
    xmoe_balance_0='xmoe model.moe.balance_weight=0.0',
    xmoe_balance_tenfold='xmoe model.moe.balance_weight=0.1',
    xmoe_16_experts='xmoe model.moe.num_experts=16',
    stablemoe_top_1='stablemoe model.moe.top_k=1',
    stablemoe_one_stage='stablemoe model.moe.two_stage=False',
    stablemoe_stage_2='stablemoe model.moe.stage1_fraction=0.02',
    stablemoe_stage_30='stablemoe model.moe.stage1_fraction=0.3',
    stablemoe_stage_100='stablemoe model.moe.stage1_fraction=1.0',
    stablemoe_balance_0='stablemoe model.moe.balance_weight=0.0',
    stablemoe_balance_tenth='stablemoe model.moe.balance_weight=0.03',
    stablemoe_balance_tenfold='stablemoe model.moe.balance_weight=3.0',
    stablemoe_distill_tenth='stablemoe model.moe.distill_weight=0.1',
    stablemoe_distill_tenfold='stablemoe model.moe.distill_weight=10.0',
    stablemoe_16_experts='stablemoe model.moe.num_experts=16',
    stablemoe_layers_23='stablemoe model.moe.moe_layers="(2, 3)"',
    softmoe_half_slots='softmoe model.moe.slots_per_token=1.0',
    softmoe_twice_slots='softmoe model.moe.slots_per_token=4.0',
    softmoe_rms='softmoe model.moe.slot_norm=rms',
    softmoe_scale_tenth='softmoe model.moe.init_scale=0.1',
    softmoe_scale_3='softmoe model.moe.init_scale=3.0',
    softmoe_scale_11='softmoe model.moe.init_scale=11.0',
    softmoe_scale_30='softmoe model.moe.init_scale=30.0',
    softmoe_scale_100='softmoe model.moe.init_scale=100.0',
    softmoe_16_experts='softmoe model.moe.num_experts=16',
    softmoe_32_experts='softmoe model.moe.num_experts=32',
    softmoe_layers_23='softmoe model.moe.moe_layers="(2, 3)"',
    softmoe_narrow='softmoe model.moe.expert_mlp_ratio=3.0 model.moe.moe_layers=every1',
    ecmoe_capacity_1='ecmoe model.moe.capacity_factor=1.0',
    ecmoe_capacity_4='ecmoe model.moe.capacity_factor=4.0',
    ecmoe_16_experts='ecmoe model.moe.num_experts=16',
    ecmoe_32_experts='ecmoe model.moe.num_experts=32',
    ecmoe_layers_23='ecmoe model.moe.moe_layers="(2, 3)"',
    ecmoe_narrow='ecmoe model.moe.expert_mlp_ratio=3.0 model.moe.moe_layers=every1',
    position_top_1='position model.moe.top_k=1',
    position_16_experts='position model.moe.num_experts=16',
    position_layers_23='position model.moe.moe_layers="(2, 3)"',
)
