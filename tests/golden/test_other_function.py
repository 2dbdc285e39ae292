"""Weights of another function, whose tensors fit, are refused or told of in a line that names it.

Fields are words, of which one must stand there: wordings may change.
"""

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image
from timm.layers import LayerNorm
from timm.models import save_for_hf

import vqmoe_vision  # noqa: F401  registers the models

from .. import cases
from ..forked import run_tool
from .runs import runs_in

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)
EXPERTS = dict(num_experts=2, moe_layers=[1])
OURS, FILE = 'vit_tiny_smoe', 'model.safetensors'
FUNCTIONS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], str]] = {
    'heads': (OURS, dict(num_heads=4), OURS, {}, 'num_heads'),
    'activation': (OURS, dict(act_layer='quick_gelu'), OURS, {}, 'act_layer|activation'),
    'epsilon': (OURS, {}, OURS, dict(norm_layer=partial(LayerNorm, eps=1e-3)), 'eps'),
    'method': (OURS, {}, 'vit_tiny_ecmoe', {}, 'ecmoe'),
    'option': (OURS, dict(top_k=1), OURS, {}, 'top_k'),
    'heads of a dense model': ('vit_tiny_patch16_224', dict(num_heads=4), OURS, {}, 'num_heads'),
}
WAYS: dict[str, Callable[[Path], dict[str, Any]]] = {
    'folder': lambda folder: {'upcycle': f'local-dir:{folder}'},
    'file': lambda folder: {'upcycle': f'{folder}/{FILE}'},
    'pretrained': lambda f: dict(pretrained=True, pretrained_cfg_overlay={'file': f'{f}/{FILE}'}),
}


def create(name: str, **options: Any) -> Any:
    experts = EXPERTS if name.endswith('moe') else {}
    return timm.create_model(name, **{**SMALL, **experts, **options})


def names(words: str, line: str) -> bool:
    return re.search(rf'(?<![\w-])({words})(?![\w-])', line) is not None


@pytest.mark.parametrize('case', FUNCTIONS)
@pytest.mark.parametrize('way', WAYS)
def test_weights_with_a_config_beside_them(case, way, tmp_path, caplog):
    theirs, saved, ours, given, words = FUNCTIONS[case]
    model = create(theirs, **saved)
    arguments = {**SMALL, **(EXPERTS if theirs == OURS else {}), **saved}
    save_for_hf(model, tmp_path / 'saved', model_args=arguments, safe_serialization=True)
    place = WAYS[way](tmp_path / 'saved')
    told = ''
    try:
        with caplog.at_level(logging.WARNING, 'vqmoe_vision'):
            create(ours, **given, **place)
    except (ValueError, UserWarning) as error:
        told = str(error)
    assert names(words, told or ''.join(caplog.messages[-1:])) and '\n' not in told


FOLDERS = 'test_dataloader.dataset.type=class_folder test_dataloader.dataset.data_root=folders'
CLASSES = ('1', '0', 'background', *'23456789')
ORDERED = {'dataset': {'metainfo': {'classes': CLASSES}}}
OTHER = 'mean=[0.5,0.5,0.5] {split}_dataloader.dataset.transform.std=[0.35,0.35,0.35]'
MEAN = '{split}_dataloader.dataset.transform.' + OTHER
TRAIN, TEST = 'train.py tiny.py', 'test.py tiny.py c/epoch_1.pth'
PATH = 'model.checkpoint_path=c/epoch_1.pth'
START = 'model.checkpoint=c/epoch_1.pth'


@cases(
    'command, words',
    (f'{TRAIN} {START} model.model_name=vit_tiny_ecmoe', 'ecmoe'),
    (f'{TEST} model.moe.top_k=1', 'top_k'),
    (f'{TEST} ' + MEAN.format(split='test'), 'mean'),
    (f'{TRAIN} {START} ' + MEAN.format(split='train'), 'mean'),
    (f'{TEST} {FOLDERS}', 'class|classes'),
    ('predict.py order.py s/iter_1.pth folders/test/1/a.png', 'class|classes'),
    (f'{TRAIN} {PATH} model.model_name=vit_tiny_ecmoe', 'ecmoe'),
    (f'{TEST} model.num_heads=4', 'num_heads'),
    (f'{TEST} model.act_layer=relu', 'act_layer'),
)
def test_weights_of_a_run(command, words, tmp_path, tmp_path_factory):
    for name in ('c', 's', 'tiny.py', 'scenes.py'):
        (tmp_path / name).symlink_to(runs_in(tmp_path_factory.getbasetemp()) / name)
    (tmp_path / 'order.py').write_text(f"_base_ = 'scenes.py'\ntest_dataloader = {ORDERED}")
    for name in range(1, 11):
        (tmp_path / f'folders/test/{name}').mkdir(parents=True)
        Image.new('RGB', (48, 48)).save(tmp_path / f'folders/test/{name}/a.png')
    tool, *words_of_it = command.split()
    places = [word for word in words_of_it if '=' not in word]
    out = '--out-dir' if tool == 'predict.py' else '--work-dir'
    options = ['--cfg-options', *words_of_it[len(places) :]] if '=' in command else []
    done = run_tool(tool, *places, out, 'w', *options, folder=tmp_path)
    lines = (done.stdout + done.stderr).splitlines()
    told = [line for line in lines if ' - WARNING - ' in line or line.startswith('error: ')]
    assert any(names(words, line) for line in told), told
