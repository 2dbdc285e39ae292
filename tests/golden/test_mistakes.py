"""A user's mistake ends a program with one line that names what to change: mistake, command, name.

unknown method | TRAIN model.model_name=vit_tiny_vqmo | model_name
value out of range | TRAIN model.moe.num_experts=0 | num_experts
data folder missing | TRAIN DATA.type=class_folder DATA.data_root=nowhere | nowhere
a class folder empty | TRAIN DATA.type=class_folder DATA.data_root={folders} | cat
label above the classes | train.py {photos} --work-dir w | masks/train/a.png
checkpoint of another method | TEST model.model_name=vit_tiny_ecmoe | ecmoe
checkpoint of another size | TEST model.embed_dim=24 | pos_embed
checkpoint of the other task | test.py {tiny} {segmenter} --work-dir w | segmentor
checkpoint damaged | test.py {tiny} {damaged} --work-dir w | {damaged}
checkpoint with code | test.py {tiny} {code} --work-dir w | {code}
none on resume | train.py {tiny} --work-dir empty --resume | --resume
config that does not exist | train.py none.py | none.py
option without a value | TRAIN max_epochs | max_epochs
hooks missing | TRAIN custom_hooks=[] | MoeStateHook
a loss that is not finite | TRAIN model.model_name=vit_tiny_patch16_224 model.moe=None param_scheduler=[] optim_wrapper.optimizer.lr=1e30 optim_wrapper.clip_grad=None | cross_entropy
odd batch for mixup | TRAIN model.mixup.mixup_alpha=0.8 train_dataloader.batch_size=599 | train_dataloader.batch_size
another number of processes than the environment says | TORCHELASTIC_RUN_ID=none RANK=0 WORLD_SIZE=2 train.py {tiny} --work-dir w | --launcher
disk full | FILE_SIZE=60000 TRAIN visualizer.vis_backends=[] | epoch_1.pth
export to an unknown suffix | export.py {tiny} {smoe} model.tflite | out
a comparison with an unknown row | compare.py run {tiny} --rows nobody | --rows

Words in braces are prepared: `{tiny}` is a config of a classifier, `{smoe}` the checkpoint of its
run, `{segmenter}` one of a Segmenter, and all others are what is wrong. Wordings may change.
"""  # noqa: E501  commands are long

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ..forked import ROOT, run_tool
from .runs import BACKBONE, LOADER, runs_in

SHORT = {
    'TRAIN': 'train.py {tiny} --work-dir w --cfg-options',
    'TEST': 'test.py {tiny} {smoe} --work-dir w --cfg-options',
    'DATA': 'train_dataloader.dataset',
}
MISTAKES = re.findall(r'^(.+) \| (.+) \| (.+)$', __doc__, re.MULTILINE)
PHOTOS = f"""
_base_ = 'mine.py'
model = dict(backbone=dict({BACKBONE} depth=4, patch_size=128), decode_head=dict(num_layers=1))
train_dataloader = dict({LOADER})
train_cfg = dict(max_iters=1, val_interval=9)
param_scheduler = []
"""


def image(path: Path, levels: int, mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, levels, (24, 32), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory) -> dict[str, str]:
    """What stands in braces, by name."""
    folder = tmp_path_factory.mktemp('mistakes')
    runs = runs_in(tmp_path_factory.getbasetemp())
    (mine, *_) = (ROOT / 'docs/how-to/own-data.md').read_text().split('\n```py\n')[1].split('```')
    (folder / 'mine.py').write_text(mine.replace('data/mine', str(folder / 'photos')))
    (folder / 'photos.py').write_text(PHOTOS)
    image(folder / 'folders/train/dog/a.png', 256, 'RGB')
    (folder / 'folders/train/cat').mkdir()
    for part in ('train', 'val'):
        image(folder / f'photos/images/{part}/a.jpg', 256, 'RGB')
        image(folder / f'photos/masks/{part}/a.png', 7, 'L')  # of three classes
    (folder / 'damaged.pth').write_bytes((runs / 'c/epoch_1.pth').read_bytes()[:-3000])
    torch.save({'state_dict': {}, 'code': image}, folder / 'code.pth')
    made = dict(tiny='tiny.py', smoe='c/epoch_1.pth', segmenter='s/iter_1.pth')
    wrong = dict(photos='photos.py', folders='folders', damaged='damaged.pth', code='code.pth')
    places = ((runs, made), (folder, wrong))
    return {name: str(place / file) for place, files in places for name, file in files.items()}


def last_line(command: list[str], folder: Path) -> str:
    """Of stderr, after a command that must fail."""
    variables = {}
    while '=' in command[0]:
        name, _, variables[name] = command.pop(0).partition('=')
    size = variables.pop('FILE_SIZE', None)  # which is how a disk is full here
    done = run_tool(*command, folder=folder, file_size=size and int(size), variables=variables)
    assert done.returncode != 0 and 'Traceback' not in done.stderr
    return done.stderr.rstrip('\n').rpartition('\n')[2]


@pytest.mark.parametrize('mistake, command, name', MISTAKES, ids=[m for m, *_ in MISTAKES])
def test_the_last_line_names_it(mistake, command, name, prepared, tmp_path):
    for short, long in SHORT.items():
        command = re.sub(rf'\b{short}\b', long, command)
    line = last_line(shlex.split(command.format_map(prepared)), tmp_path)
    word = re.escape(name.format_map(prepared))
    assert '\n' not in line and re.search(rf'(?<![\w-]){word}(?![\w-])', line), line
