"""Commands with a mistake, as a user types them, and what the last line of stderr must name.

What stands in braces is prepared by `test_mistakes.py`: `{tiny}` is a config of a classifier,
`{smoe}` the checkpoint of its run, `{segmenter}` one of a Segmenter, and all others are what is
wrong. Wordings may change, what is named may not.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """A command that must end with one line."""

    name: str
    command: str  # NAME=VALUE in front are variables of the environment
    field: str  # what the line has as a word: the option, the argument or the file to be changed
    file_size: int | None = None  # bytes that a file may have, which is how a disk is full here


TRAIN = 'tools/train.py {tiny} --work-dir w --cfg-options'
TEST = 'tools/test.py {tiny} {smoe} --work-dir w --cfg-options'


def _create(arguments: str) -> str:
    return f'python -c "import timm, vqmoe_vision; timm.create_model({arguments})"'


MISTAKES = [
    Mistake('unknown method', f'{TRAIN} model.model_name=vit_tiny_vqmo', 'model_name'),
    Mistake('option misspelt', _create("'vit_tiny_vqmoe', num_expert=4"), 'num_expert'),
    Mistake('option of another method', _create("'vit_tiny_vqmoe', top_k=2"), 'top_k'),
    Mistake('value out of range', f'{TRAIN} model.moe.num_experts=0', 'num_experts'),
    Mistake('top_k above the experts', _create("'vit_tiny_smoe', num_experts=2, top_k=3"), 'top_k'),
    Mistake(
        'data folder missing',
        f'{TRAIN} train_dataloader.dataset.type=class_folder '
        'train_dataloader.dataset.data_root=nowhere',
        'nowhere/train',
    ),
    Mistake(
        'a class folder empty',
        f'{TRAIN} train_dataloader.dataset.type=class_folder '
        'train_dataloader.dataset.data_root={folders}',
        'cat',
    ),
    Mistake('label above the classes', 'tools/train.py {photos} --work-dir w', 'masks/train/a.png'),
    Mistake('checkpoint of another method', f'{TEST} model.model_name=vit_tiny_ecmoe', 'ecmoe'),
    Mistake('checkpoint of another size', f'{TEST} model.embed_dim=24', 'pos_embed'),
    Mistake(
        'checkpoint of the other task',
        'tools/test.py {tiny} {segmenter} --work-dir w',
        'backbone',
    ),
    Mistake('checkpoint damaged', 'tools/test.py {tiny} {damaged} --work-dir w', '{damaged}'),
    Mistake('checkpoint with code', 'tools/test.py {tiny} {code} --work-dir w', '{code}'),
    Mistake('none on resume', 'tools/train.py {tiny} --work-dir empty --resume', '--resume'),
    Mistake('config that does not exist', 'tools/train.py none.py', 'none.py'),
    Mistake('option without a value', f'{TRAIN} max_epochs', 'max_epochs'),
    Mistake('hooks missing', f'{TRAIN} custom_hooks=[]', 'MoeStateHook'),
    Mistake(
        'a loss that is not finite',
        f'{TRAIN} model.model_name=vit_tiny_patch16_224 model.moe=None param_scheduler=[] '
        'optim_wrapper.optimizer.lr=1e30 optim_wrapper.clip_grad=None',
        'cross_entropy',
    ),
    Mistake(
        'odd batch for mixup',
        f'{TRAIN} model.mixup.mixup_alpha=0.8 train_dataloader.batch_size=599',
        'train_dataloader.batch_size',
    ),
    Mistake(
        'fewer batches than processes',
        'torchrun --nproc_per_node=2 tools/train.py {tiny} --launcher pytorch --work-dir w '
        '--cfg-options train_dataloader.batch_size=900',
        'train_dataloader.batch_size',
    ),
    Mistake(
        'another number of processes than the environment says',
        'TORCHELASTIC_RUN_ID=none RANK=0 WORLD_SIZE=2 tools/train.py {tiny} --work-dir w',
        '--launcher',
    ),
    Mistake(
        'disk full',
        'tools/train.py {tiny} --work-dir w --cfg-options visualizer.vis_backends=[]',
        'epoch_1.pth',
        file_size=60_000,
    ),
    Mistake(
        'upcycling from a network of convolutions',
        _create("'vit_tiny_smoe', upcycle='{convolutions}'"),
        '{convolutions}',
    ),
    Mistake('export to an unknown suffix', 'tools/export.py {tiny} {smoe} model.tflite', 'out'),
    Mistake(
        'a comparison with an unknown row',
        'tools/compare.py run {tiny} --rows nobody',
        '--rows',
    ),
]
