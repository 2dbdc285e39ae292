# Experts put into a ViT that ImageNet trained: DeiT-Tiny learns 10,000 images of CIFAR-100 at 64
# pixels, each row from the same weights. The images are listed in docs/results/cifar100_10k.txt;
# docs/how-to/data.md makes their folder. The learning rate and the length are chosen by
# docs/archive/specs/cifar100_deit_screening.py. dense_longer trains as many more epochs as the
# experts of a token cost in multiply-accumulates. SMoE, its frozen router, XMoE, experts by
# position and VQMoE's discrete form begin with the answers of the dense model.
config = 'vqmoe_vision::classification/cifar10_budget.py'
metric = 'accuracy/top1'
also = ['accuracy/top5']
reference = 'dense_longer'
seeds = [1, 2, 3, 4, 5]
# primary, named before the first run; every other difference is exploratory
contrasts = ['smoe - dense_longer', 'smoe - smoe_frozen', 'vqmoe - smoe']
margin = 1.0
vqmoe = (
    'vqmoe model.moe.codebook=projected model.moe.code_dim=24 '
    'model.moe.routed_scaling_factor=4.0 model.moe.router_drop=0.3'
)
rows = dict(
    dense_1x='dense_1x',
    dense_longer=(
        'dense_1x train_cfg.max_epochs=8 param_scheduler.1.end=8 param_scheduler.1.T_max=7'
    ),
    smoe='smoe model.moe.renormalize=True',
    smoe_frozen='smoe_frozen model.moe.renormalize=True',
    vqmoe=vqmoe,
    # two seeds each
    position='position',
    xmoe='xmoe model.moe.renormalize=True',
    softmoe='softmoe',
    vqmoe_discrete='vqmoe model.moe.form=discrete model.moe.code_dim=24',
)
del vqmoe
options = [
    'model.img_size=64',
    'model.patch_size=16',
    'model.embed_dim=192',
    'model.depth=12',
    'model.num_heads=3',
    'model.class_token=True',
    'model.global_pool=token',
    'model.num_classes=100',
    'model.checkpoint=data/deit_tiny_patch16_224.safetensors',
    'total_batch_size=64',
    'train_dataloader.dataset.transform.padding=8',
    *(
        f'{split}_dataloader.dataset.{field}'
        for split in ('train', 'val', 'test')
        for field in (
            'type=class_folder',
            'data_root=data/cifar100_10k',
            'transform.input_size=64',
            'transform.mean="(0.485, 0.456, 0.406)"',
            'transform.std="(0.229, 0.224, 0.225)"',
        )
    ),
]
