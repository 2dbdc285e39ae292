"""`--cfg-options`, also as docs/how-to/commands.md writes them."""

import argparse
import math
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.optim import DefaultOptimWrapperConstructor, build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn

import vqmoe_vision  # noqa: F401
from vqmoe_vision.engine import optim
from vqmoe_vision.engine.cli import load_config, run
from vqmoe_vision.engine.config import (
    check_fields,
    check_folders,
    flat,
    merge_options,
    parse_options,
    share_batch,
)
from vqmoe_vision.engine.model import scope_of

from .. import cases, refused
from .tiny import DIGITS

DOCUMENT = (Path(__file__).parents[2] / 'docs/how-to/commands.md').read_text().replace('\\\n', ' ')
DOCUMENTED = re.findall(r'^python tools/train\.py \$C --cfg-options (.+)$', DOCUMENT, re.M)


@cases(
    'written, value',
    ("{'custom_keys': {'head': {'lr_mult': 2}}}", {'custom_keys': {'head': {'lr_mult': 2}}}),
    ('{}', {}),
    ("[{'type': 'A', 'size': (1, 2)}, 'b']", [{'type': 'A', 'size': (1, 2)}, 'b']),
    ('[(1,2),(a,b)]', [(1, 2), ('a', 'b')]),  # as mmengine reads it
    ('epoch_{}.pth', 'epoch_{}.pth'),
)
def test_values(written, value):
    assert parse_options([f'a.b={written}']) == {'a.b': value}


def test_only_a_hook_that_is_there_is_left_out():
    hooks = {'logger2': {'type': 'LoggerHook'}, 'runtime': {'type': 'StepValuesHook'}}
    config = Config({'default_hooks': hooks})
    merge_options(config, {'default_hooks.logger2': None, 'default_hooks.timer': None})
    merge_options(config, {'default_hooks.runtime.priority': None})  # an option of a hook
    with pytest.raises(ValueError, match=r'^default_hooks\.logger3=None is not possible'):
        merge_options(config, {'default_hooks.logger3': None})
    check_fields(config)
    runtime = {'type': 'StepValuesHook', 'priority': None}
    assert config.default_hooks == {'runtime': runtime, 'timer': None}  # which mmengine pops


PLACES = {
    'model.checkpoint': '~/x.pth',
    'model.upcycle': 'local-dir:~/folder',
    'model.pretrained_cfg_overlay.file': '~/y.pth',
    'load_from': '~/z.pth',
    'train_dataloader.dataset.data_root': '~',
    'custom_hooks': [{'type': 'a~b', 'path': '~/w'}],
}


def test_the_folder_of_the_user_is_known_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    home, own = str(tmp_path), tmp_path / 'own.py'
    expected = {n: v if v == 'a~b' else v.replace('~', home) for n, v in flat(PLACES).items()}
    load_config(str(DIGITS), PLACES).dump(own)
    own.write_text(own.read_text().replace(home, '~'))
    for config in (load_config(str(own)), load_config(str(DIGITS), PLACES)):
        found = flat(config.to_dict())
        assert {name: found[name] for name in expected} == expected
    parser = argparse.ArgumentParser()
    parser.add_argument('files', nargs='+')
    parser.add_argument('--out', type=Path)
    parser.add_argument('--cfg-options', nargs='+', default=[])
    seen: list[argparse.Namespace] = []
    given = '~/a.pth local-dir:~/b --out=~/c.json --cfg-options upcycle=~/d'
    run(parser, given.split(), seen.append)
    files, options = [f'{home}/a.pth', f'local-dir:{home}/b'], {'upcycle': f'{home}/d'}
    assert vars(seen[0]).items() >= dict(files=files, out=tmp_path / 'c.json').items()
    assert seen[0].cfg_options == options


@pytest.mark.parametrize('options', DOCUMENTED)
def test_documented_options_are_read_and_make_an_optimizer(options):
    given = parse_options(shlex.split(options, comments=True))
    assert not [v for v in flat(given).values() if isinstance(v, str) and v[:1] in '{[(']
    config = load_config(str(DIGITS), given)
    with scope_of(config):
        build_optim_wrapper(MODELS.build(config.model), config.optim_wrapper)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model(
            'vit_tiny_vqmoe', img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3,
            num_classes=2, num_experts=2, codebook='cvq',
        )  # fmt: skip


SGD = {'type': 'SGD', 'lr': 1.0, 'weight_decay': 0.3}


def test_the_longest_custom_key_wins_as_in_mmengine():
    model = Wrapped()
    keys = {'blocks': {'lr_mult': 0.5}, 'head': {'decay_mult': 0.0}}
    keys['blocks.1'] = {'lr_mult': 0.1, 'decay_mult': 2.0}

    def settings(kind: type) -> dict[str, tuple[float, float]]:
        build = kind({'optimizer': SGD}, {'custom_keys': keys})
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return {
            names[id(parameter)]: (group['lr'], group['weight_decay'])
            for group in build(model).optimizer.param_groups
            for parameter in group['params']
        }

    kinds = optim.TimmOptimWrapperConstructor, DefaultOptimWrapperConstructor
    ours, theirs = map(settings, kinds)
    assert ours['model.blocks.1.attn.qkv.weight'] == (0.1, 0.6)
    undecayed = optim.undecayed_parameters(model)
    for name, parameter in model.named_parameters():
        rate, decay = theirs[name]
        decays = parameter.ndim > 1 and not name.endswith('.bias') and name not in undecayed
        assert ours[name] == (rate, decay if decays else 0.0)  # timm's rule


@cases(
    'paramwise, message',
    ({'norm_decay_mult': 0.0}, r'norm_decay_mult=0\.0 is not possible: .* takes custom_keys'),
    ({'custom_keys': {'head': {'lr': 1.0}}}, r"\['head'\]\.lr=.* lr_mult or decay_mult"),
    ({'custom_keys': {'head': {'lr_mult': math.nan}}}, r"\['head'\]\.lr_mult=nan"),
    ({'custom_keys': {'hed': {'lr_mult': 2.0}}}, r"custom_keys='hed' .* model\.cls_token"),
)
def test_constructor_refuses_what_it_would_ignore(paramwise, message):
    config = {'optimizer': {'type': 'SGD', 'lr': 1.0}}
    refused(message, lambda: optim.TimmOptimWrapperConstructor(config, paramwise)(Wrapped()))


def test_cpu_amp_runs_the_forward_pass_in_bfloat16_and_steps_in_float32():
    layer = nn.Linear(3, 2)
    wrapper = optim.CpuAmpOptimWrapper(optimizer=torch.optim.SGD(layer.parameters(), lr=1.0))
    before = layer.weight.detach().clone()
    with wrapper.optim_context(layer):
        out = layer(torch.ones(4, 3))
    assert out.dtype == torch.bfloat16
    wrapper.update_params(out.sum())
    # d(sum of 4 rows)/dw = 4 for each weight
    torch.testing.assert_close(layer.weight.detach(), before - 4)


@cases('scope, page', ('mmseg', r'segmentation\.md'), (None, r'data\.md'))
def test_a_missing_data_set_is_said_with_its_page(scope, page):
    config = Config(dict(default_scope=scope, val_dataloader=dict(dataset=dict(data_root='gone'))))
    message = rf"^val_dataloader\.dataset\.data_root='gone' does not exist: docs/how-to/{page}"
    refused(message, check_folders, config, ['train', 'val'])


def test_a_base_of_mmsegmentation_is_read(tmp_path):
    mmseg = pytest.importorskip('mmseg')
    name = '_base_/models/segmenter_vit-b16_mask.py'
    (tmp_path / 'mine.py').write_text(
        f"_base_ = ['mmseg::{name}']\nmodel = dict(pretrained=None)\n"
    )
    theirs = Config.fromfile(Path(mmseg.__file__).parent / '.mim/configs' / name)
    own = load_config(str(tmp_path / 'mine.py'))
    assert own.model.pretrained is None and own.model.decode_head == theirs.model.decode_head
    assert load_config(f'mmseg::{name}').model == theirs.model


TOTAL = 'total_batch_size = 8\ntrain_dataloader = dict(batch_size=1)\n'


@cases(
    'text, options, batches',
    ('', {}, {1: 8, 2: 4, 8: 1}),  # total over processes
    ('', {'optim_wrapper.accumulative_counts': 2}, {1: 4, 2: 2, 4: 1}),
    ('', {'total_batch_size': 32}, {1: 32, 8: 4}),
    ('', {'total_batch_size': 32, 'train_dataloader.batch_size': 16}, {2: 16}),
    # who states the batch of a process has it, whatever the total was
    ('', {'train_dataloader.batch_size': 3}, {1: 3, 8: 3}),
    ('train_dataloader = dict(batch_size=4)', {}, {1: 4, 8: 4}),
    ('train_dataloader = dict(batch_size=1, num_workers=4)', {}, {1: 8, 8: 1}),  # a copy of it
    ('total_batch_size = 24', {}, {1: 24, 8: 3}),
    ('total_batch_size = None', {}, {1: 1, 8: 1}),
    # what cannot be shared is one line
    ('', {}, {3: 'total_batch_size=8 '}),
    ('', {'optim_wrapper.accumulative_counts': 8}, {2: 'total_batch_size=8 '}),
    ('', {'total_batch_size': 8, 'train_dataloader.batch_size': 2}, {2: r'train_dataloader\.b'}),
)
def test_processes_share_the_total_batch(text, options, batches, tmp_path):
    (tmp_path / 'base.py').write_text(TOTAL)
    (tmp_path / 'mine.py').write_text(f"_base_ = 'base.py'\n{text}\n")
    mine = str(tmp_path / 'mine.py')
    for name in ('total_batch_size', 'optim_wrapper.accumulative_counts'):
        refused(f'^{name}=0 ', load_config, mine, {'total_batch_size': 8, name: 0})
    config = load_config(mine, options)
    for processes, batch in batches.items():
        if isinstance(batch, str):
            refused(f'^{batch}', share_batch, config, processes, options)
            continue
        share_batch(config, processes, options)
        assert config.train_dataloader.batch_size == batch
    # mmengine's own reading has the batch of each process
    theirs = Config.fromfile(mine).train_dataloader.batch_size
    assert theirs == (4 if 'batch_size=4' in text else 1)
