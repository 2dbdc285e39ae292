# Token choice as of 2026 on CIFAR-100, in the four epochs of cifar100: sigmoid scores and a bias
# that evens loads, a shared expert, gated MLPs, a router that a dense model teaches. All contrasts
# were named before the first run.
_base_ = 'cifar100.py'
reference = 'smoe'
start = 'vqmoe_vision::comparisons/cifar100_routing.py dense_1x epoch_4.pth'
contrasts = [
    'smoe_sigmoid - smoe',
    'smoe_shared - smoe',
    'smoe_gated - smoe',
    'tgrmoe - smoe',
]
rows = dict(
    _delete_=True,
    dense_1x='dense_1x',
    smoe='smoe',
    smoe_sigmoid='smoe_sigmoid',
    smoe_shared='smoe_shared',
    # in all blocks, with the multiply-accumulates of plain ones
    smoe_gated='smoe model.mlp_layer=SwiGLU model.mlp_ratio=2.6875',
    tgrmoe='tgrmoe model.features={start}',
)
