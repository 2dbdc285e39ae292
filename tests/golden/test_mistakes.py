"""A user's mistake ends a program with one line that names what to change."""

import re
import shlex
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from ..forked import ROOT, run_tool
from .mistakes import MISTAKES, Mistake
from .runs import BACKBONE, LOADER, runs_in

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
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands in braces, by name."""
    folder = tmp_path_factory.mktemp('mistakes')
    runs = runs_in(tmp_path_factory.getbasetemp())
    (mine, *_) = (ROOT / 'docs/own-data.md').read_text().split('\n```py\n')[1].split('```')
    (folder / 'mine.py').write_text(mine.replace('data/mine', str(folder / 'photos')))
    (folder / 'photos.py').write_text(PHOTOS)
    image(folder / 'folders/train/dog/a.png', 256, 'RGB')
    (folder / 'folders/train/cat').mkdir()
    for part in ('train', 'val'):
        image(folder / f'photos/images/{part}/a.jpg', 256, 'RGB')
        image(folder / f'photos/masks/{part}/a.png', 7, 'L')  # of three classes
    (folder / 'damaged.pth').write_bytes((runs / 'c/epoch_1.pth').read_bytes()[:-3000])
    torch.save({'state_dict': {}, 'code': image}, folder / 'code.pth')
    torch.save(timm.create_model('test_resnet').state_dict(), folder / 'resnet.pth')
    made = dict(tiny='tiny.py', smoe='c/epoch_1.pth', segmenter='s/iter_1.pth')
    wrong = dict(photos='photos.py', folders='folders', convolutions='resnet.pth')
    wrong |= dict(damaged='damaged.pth', code='code.pth')
    places = ((runs, made), (folder, wrong))
    return {name: str(place / file) for place, files in places for name, file in files.items()}


def last_line(mistake: Mistake, command: list[str], folder: Path) -> str:
    """Of stderr, after a command that must fail."""
    if command[0] == 'python':
        with pytest.raises((ValueError, TypeError)) as caught:
            exec(command[2], {})
        return str(caught.value)
    variables, number = {}, 1
    while '=' in command[0]:
        name, _, variables[name] = command.pop(0).partition('=')
    if command[0] == 'torchrun':
        number = int(command[1].partition('=')[2])
        with socket.socket() as one:
            one.bind(('127.0.0.1', 0))
            port = str(one.getsockname()[1])
        variables = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'WORLD_SIZE': str(number)}
        del command[:2]

    def start(rank: int) -> tuple[int, str]:
        of_rank = {'RANK': str(rank), 'LOCAL_RANK': str(rank)} if number > 1 else {}
        done = run_tool(
            Path(command[0]).name, *command[1:], folder=folder, file_size=mistake.file_size,
            variables={**variables, **of_rank},
        )  # fmt: skip
        return done.returncode, done.stderr

    with ThreadPoolExecutor(number) as pool:
        ended = list(pool.map(start, range(number)))
    said = ''.join(err for _, err in ended)
    assert all(status != 0 for status, _ in ended)
    assert 'Traceback' not in said
    return said.rstrip('\n').rpartition('\n')[2]


@pytest.mark.parametrize('mistake', MISTAKES, ids=lambda mistake: mistake.name)
def test_the_last_line_names_it(mistake: Mistake, prepared: dict[str, str], tmp_path: Path) -> None:
    command = shlex.split(mistake.command.format_map(prepared))
    line = last_line(mistake, command, tmp_path)
    field = re.escape(mistake.field.format_map(prepared))
    assert '\n' not in line and re.search(rf'(?<![\w-]){field}(?![\w-])', line), line
