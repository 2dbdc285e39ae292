"""A V-MoE becomes a folder that timm reads, whole or not at all."""

import json
from pathlib import Path

import pytest
import timm
import torch

from vqmoe_vision.contrib.vmoe_checkpoints import convert_vmoe

from .vmoe import TINY, forward, make_tree, write_files


def test_the_folder_is_the_model(tmp_path: Path, capsys) -> None:
    tree = make_tree(**TINY)
    write_files(tmp_path / 'tiny', tree)
    out = tmp_path / 'converted'
    convert_vmoe([str(tmp_path / 'tiny'), str(out), '--cfg-options', 'top_k=1'])
    said = capsys.readouterr().out
    assert said.startswith(
        f'wrote {out}: vit_tiny_smoe with 4 experts in blocks 0, 2, images of 16'
    )
    assert said.endswith('top_k=1, eval_capacity_factor=None\n')
    assert sorted(path.name for path in out.iterdir()) == ['config.json', 'model.safetensors']
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    images = torch.rand(2, 16, 16, 3) * 2 - 1
    with torch.no_grad():
        logits = model(images.permute(0, 3, 1, 2))
    # float32, of logits of about one
    torch.testing.assert_close(logits.double(), forward(tree, images, 1), rtol=0, atol=1e-5)
    expected = {'mean': [0.5] * 3, 'std': [0.5] * 3, 'crop_pct': 1.0, 'crop_mode': 'squash'}
    assert {name: model.pretrained_cfg[name] for name in expected} == expected
    with pytest.raises(ValueError, match=r'shapes: blocks'):
        timm.create_model(f'local-dir:{out}', pretrained=True, num_experts=8)


def test_images_of_224_pixels_are_the_middle(tmp_path: Path) -> None:
    write_files(tmp_path / 'tiny', make_tree(**{**TINY, 'image': 224, 'patch': 56}))
    convert_vmoe([str(tmp_path / 'tiny'), str(tmp_path / 'out')])
    content = json.loads((tmp_path / 'out/config.json').read_text())
    expected = {'input_size': [3, 224, 224], 'crop_pct': 0.875, 'crop_mode': 'center'}
    assert content['pretrained_cfg'].items() >= expected.items()
    assert content['model_args'].items() >= {'top_k': 2, 'num_experts': 4}.items()


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    write_files(tmp_path / 'tiny', make_tree(**TINY))
    before = sorted(tmp_path.iterdir())
    source, out = str(tmp_path / 'tiny'), str(tmp_path / 'out')
    for arguments, message in (
        ([str(tmp_path / 'none'), out], r"none\.index' does not exist"),
        ([source, source + '.index'], 'a folder that does not exist'),
        ([source, out, '--cfg-options', 'num_experts=8'], r'num_experts=8.* 4, which checkpoint'),
        ([source, out, '--cfg-options', 'eval_capacity_factor=-1.0'], 'eval_capacity_factor=-1.0'),
        ([source, out, '--cfg-options', 'capacity=1'], "'capacity'"),
    ):
        with pytest.raises(SystemExit, match=message) as caught:
            convert_vmoe(arguments)
        assert '\n' not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
