"""V-MoE's files and trees as `vit_*_smoe`: what they compute, what is refused."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import timm
import torch
from torch import Tensor

from vqmoe_vision.contrib import vmoe_checkpoints as vmoe
from vqmoe_vision.models.compat import misfit

from .. import cases, refused
from .vmoe import B16, S32, TINY, Tree, forward, make_tree, padded_capacity, shard_file, write_files

# float32 here and float64 there; with logits of about one. The other form of GELU is 1e-4 off.
CLOSE = {'rtol': 0, 'atol': 1e-5}


@pytest.fixture
def tree() -> Tree:
    return make_tree(**TINY)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 16, 16, 3) * 2 - 1


def answers(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images.permute(0, 3, 1, 2)).double()


@pytest.mark.parametrize('top_k', [1, 2])
def test_logits_are_those_of_jax(tree, images, top_k, tmp_path):
    write_files(tmp_path / 'tiny', tree)
    model: Any = vmoe.load_vmoe(str(tmp_path / 'tiny'), top_k=top_k)
    assert not model.training and model.method == 'smoe'
    torch.testing.assert_close(answers(model, images), forward(tree, images, top_k), **CLOSE)


def test_without_head_the_answers_are_the_features(images, tmp_path):
    tree = make_tree(**TINY, representation=True)
    write_files(tmp_path / 'tiny', tree)
    features = {name: value for name, value in tree.items() if not name.startswith('head')}
    model = vmoe.load_vmoe(str(tmp_path / 'tiny.index'), head=False)
    torch.testing.assert_close(answers(model, images), forward(features, images, 2), **CLOSE)


def test_a_full_expert_drops_the_same_tokens(tree, images, tmp_path):
    write_files(tmp_path / 'tiny', tree)
    model = vmoe.load_vmoe(str(tmp_path / 'tiny'), eval_capacity_factor=1.05)
    # the batch is one group, and this number is a multiple of four without rounding
    capacity = padded_capacity(4 * 17, 4, 2, 1.05)
    assert capacity == 36
    expected = forward(tree, images, 2, capacity)
    assert (expected - forward(tree, images, 2)).abs().max() > 0.01  # some are dropped
    torch.testing.assert_close(answers(model, images), expected, **CLOSE)


def test_the_capacities_that_the_documentation_names():
    page = (Path(__file__).parents[2] / 'docs/how-to/weights-in.md').read_text()
    rows = re.findall(r'^\|[BS]/\d+, (\d+) pixels\|([\d.]+)\|([\d.]+)\|$', page, re.M)
    assert len(rows) == 4
    for (pixels, factor, ours), patch in zip(rows, (16, 16, 32, 32), strict=True):
        tokens = 8 * ((int(pixels) // patch) ** 2 + 1)  # their group
        places = math.ceil(2 * tokens * float(ours) / 8)  # ours, as `SMoERouter` counts them
        assert places == padded_capacity(tokens, 8, 2, float(factor))


@cases(
    'sizes, image, classes, name, expected, millions',
    (B16, 224, 21_843, 'vit_base_smoe', {'img_size': 224, 'depth': 12}, 301.0),
    (B16, 384, 1_000, 'vit_base_smoe', {'img_size': 384, 'patch_size': 16}, 285.2),
    (S32, 384, 1_000, 'vit_small_smoe', {'embed_dim': 512, 'depth': 8, 'num_heads': 8}, 56.8),
)
def test_published_sizes(sizes, image, classes, name, expected, millions):
    tree = make_tree(**sizes, image=image, classes=classes, device='meta')
    entry_point, arguments = vmoe.arguments_of(tree, 'published')
    assert entry_point == name
    expected |= {'num_experts': 8, 'num_classes': classes, 'moe_layers': [*sizes['moe_layers']]}
    assert arguments.items() >= expected.items()
    model = timm.create_model(name, device='meta', **arguments)
    assert misfit(model.state_dict(), vmoe.in_our_names(tree)) == ''
    assert round(sum(value.numel() for value in tree.values()) / 1e6, 1) == millions


@pytest.mark.parametrize('shards', [1, 3])
@pytest.mark.parametrize('version', ['20220622', None])
def test_files_of_both_versions(tree, shards, version, tmp_path):
    tree = {name: value.bfloat16() for name, value in tree.items()}  # which is read too
    write_files(tmp_path / 'tiny', tree, shards, version)
    state = vmoe.load_vmoe(str(tmp_path / 'tiny')).state_dict()
    assert all(torch.equal(state[k], v.float()) for k, v in vmoe.in_our_names(tree).items())


def changed(name: str, value: Any) -> Callable[[Tree], Tree]:
    return lambda tree: {k: v for k, v in {**tree, name: value}.items() if v is not None}


BLOCK = 'Encoder/encoderblock_2'
POSITIONS = 'Encoder/posembed_input/pos_embedding'


@cases(
    'change, options, message',
    (changed('cls', None), {}, 'missing keys: cls_token'),
    (changed('MapHead/probe', torch.ones(1)), {}, 'unexpected keys: MapHead.probe'),
    (changed(f'{BLOCK}/LayerNorm_0/scale', torch.ones(64)), {}, r'norm1\.weight is \(64,\)'),
    (changed(POSITIONS, torch.ones(1, 16, 32)), {}, '=16 is not possible'),
    (changed('pre_logits/kernel', torch.ones(32, 32)), {}, 'without its head .* fit'),
    (changed('head/bias', torch.full((10,), torch.nan)), {}, 'head.bias has values nan'),
    (lambda tree: {k: v for k, v in tree.items() if '/Moe/' not in k}, {}, 'of a dense ViT'),
    (dict, {'num_experts': 16}, 'num_experts=16 .* 4, which checkpoint .* has'),
    (dict, {'router_bias': True}, "does not fit with {'router_bias': True}: .*router.bias"),
)
def test_what_does_not_fit_is_one_line(tree, change, options, message, tmp_path):
    write_files(tmp_path / 'tiny', change(tree))
    refused(message, vmoe.load_vmoe, str(tmp_path / 'tiny'), **options)


def without_a_chunk(prefix: Path) -> None:
    content = msgpack.unpackb(shard_file(prefix).read_bytes())
    del content['0']
    shard_file(prefix).write_bytes(msgpack.packb(content))


@cases(
    'damage, message',
    (lambda p: Path(f'{p}.index').unlink(), r"tiny\.index' does not exist; a checkpoint of"),
    (lambda p: shard_file(p, 1).unlink(), r"tiny\.data-00001-of-00002' does not exist"),
    (lambda p: os.truncate(shard_file(p, 1), 99), r"00001-of-00002' is truncated or damaged"),
    (without_a_chunk, r'incomplete or damaged: of Encoder/encoder_norm/bias, .* 16 of 32'),
    (lambda p: Path(f'{p}.index').write_bytes(b'\x80\x04K\x01.'), 'truncated or damaged'),
    (lambda p: Path(f'{p}.index').write_bytes(msgpack.packb({'params': {}})), 'no file of V-MoE'),
)
def test_files_that_cannot_be_read_are_one_line(tree, damage, message, tmp_path):
    write_files(tmp_path / 'tiny', tree)
    damage(tmp_path / 'tiny')
    refused(message, vmoe.load_vmoe, str(tmp_path / 'tiny'))


def test_the_folder_is_the_model(tree, images, tmp_path, capsys):
    write_files(tmp_path / 'tiny', tree)
    out = tmp_path / 'converted'
    vmoe.convert_vmoe([str(tmp_path / 'tiny'), str(out), '--cfg-options', 'top_k=1'])
    said = capsys.readouterr().out
    assert said.startswith(f'wrote {out}: vit_tiny_smoe with 4 experts in blocks 0, 2, images of')
    assert said.endswith('top_k=1, eval_capacity_factor=None\n')
    assert sorted(path.name for path in out.iterdir()) == ['config.json', 'model.safetensors']
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    torch.testing.assert_close(answers(model, images), forward(tree, images, 1), **CLOSE)
    expected = {'mean': [0.5] * 3, 'std': [0.5] * 3, 'crop_pct': 1.0, 'crop_mode': 'squash'}
    assert {name: model.pretrained_cfg[name] for name in expected} == expected
    with pytest.raises(ValueError, match=r'shapes: blocks'):
        timm.create_model(f'local-dir:{out}', pretrained=True, num_experts=8)


def test_images_of_224_pixels_are_the_middle(tmp_path):
    write_files(tmp_path / 'tiny', make_tree(**{**TINY, 'image': 224, 'patch': 56}))
    vmoe.convert_vmoe([str(tmp_path / 'tiny'), str(tmp_path / 'out')])
    content = json.loads((tmp_path / 'out/config.json').read_text())
    expected = {'input_size': [3, 224, 224], 'crop_pct': 0.875, 'crop_mode': 'center'}
    assert content['pretrained_cfg'].items() >= expected.items()
    assert content['model_args'].items() >= {'top_k': 2, 'num_experts': 4}.items()


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path):
    write_files(tmp_path / 'tiny', make_tree(**TINY))
    before = sorted(tmp_path.iterdir())
    source, out = str(tmp_path / 'tiny'), str(tmp_path / 'out')
    for arguments, message in (
        ([source, source + '.index'], 'a folder that does not exist'),
        ([source, out, '--cfg-options', 'num_experts=8'], r'num_experts=8.* 4, which checkpoint'),
        ([source, out, '--cfg-options', 'capacity=1'], "'capacity'"),
    ):
        refused(message, vmoe.convert_vmoe, arguments, error=SystemExit)
    assert sorted(tmp_path.iterdir()) == before
