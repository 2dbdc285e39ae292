"""Released Segmenters: mmsegmentation's and the authors' files give the answers that they gave.

The files themselves are not here. mmseg's models are built from mmseg's own configs, with the bias
in the stem that the files have; the authors' model is written out below, in their names.
"""

from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import mmseg
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.model import load_trained
from vqmoe_vision.models.vit_moe import SIZES
from vqmoe_vision.segmentation.preprocessor import completed

from ..rows import CONFIGS, ade20k, row_options
from .conftest import build

ADE = CONFIGS / 'segmentation/ade20k'
ZOO = Path(mmseg.__file__).parent / '.mim/configs/segmenter'
ZOO_NAME = 'segmenter_vit-{}_8xb1-160k_ade20k-512x512'
MMSEG = {ZOO_NAME.format(f'{size[0]}_mask'): (ade20k(size, 'dense'), {}) for size in SIZES} | {
    ZOO_NAME.format('s_fcn'): (
        'segmenter_vit-s-vqmoe_linear_8xb1-160k_ade20k-512x512',
        row_options('dense_1x', 'small', 'model.backbone'),
    )
}
MASK, LINEAR = ZOO_NAME.format('t_mask'), ZOO_NAME.format('s_fcn')
ORIGINAL = 'segmenter-original_vit-s-vqmoe_mask_8xb1-162k_ade20k-512x512'
WIDTH, HEADS, SIDE, CLASSES = 24, 3, 64, 150


class Decoder(nn.Module):
    """The authors' mask transformer, by their names."""

    def __init__(self) -> None:
        super().__init__()
        norm = partial(LayerNorm, eps=1e-5)
        blocks = (Block(WIDTH, HEADS, qkv_bias=True, norm_layer=norm) for _ in range(2))
        self.blocks = nn.ModuleList(blocks)
        self.cls_emb = nn.Parameter(torch.empty(1, CLASSES, WIDTH))
        self.proj_dec = nn.Linear(WIDTH, WIDTH)
        self.proj_patch = nn.Parameter(torch.empty(WIDTH, WIDTH))
        self.proj_classes = nn.Parameter(torch.empty(WIDTH, WIDTH))
        self.decoder_norm, self.mask_norm = norm(WIDTH), norm(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.proj_dec(x), self.cls_emb.expand(len(x), -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        patches = nn.functional.normalize(x[:, :-CLASSES] @ self.proj_patch, dim=-1)
        masks = nn.functional.normalize(x[:, -CLASSES:] @ self.proj_classes, dim=-1)
        return self.mask_norm(patches @ masks.transpose(1, 2))


class Original(nn.Module):
    """The authors' model for one window; their encoder keeps its head for ImageNet."""

    def __init__(self, mask: bool) -> None:
        super().__init__()
        norm = partial(LayerNorm, eps=1e-5)
        sizes = dict(img_size=SIDE, embed_dim=WIDTH, depth=2, num_heads=HEADS)
        self.encoder = VisionTransformer(**sizes, num_classes=1000, norm_layer=norm)
        linear = nn.Sequential(OrderedDict(head=nn.Linear(WIDTH, CLASSES)))
        self.decoder = Decoder() if mask else linear

    def forward(self, images: Tensor) -> Tensor:
        x = self.decoder(self.encoder.forward_features(images)[:, 1:])
        maps = x.transpose(1, 2).unflatten(2, self.encoder.patch_embed.grid_size)
        return nn.functional.interpolate(maps, images.shape[-2:], mode='bilinear')


def drawn(model: Any) -> Any:
    """With weights that let every tensor matter, an epsilon of the norms too."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.3)
        if any(part in name for part in ('pos_embed', 'cls_token', 'patch_embed')):
            parameter.data *= 0.01
    return model.eval()


def zoo_model(name: str, bias: bool) -> Any:
    """A small model of a config of mmseg's, for windows of `SIDE` pixels."""
    config = Config.fromfile(ZOO / f'{name}.py').model
    config.pretrained = None
    sizes = dict(embed_dims=WIDTH, num_heads=HEADS, num_layers=2, img_size=(SIDE, SIDE))
    config.backbone.update(sizes, patch_bias=bias)
    fitted = dict(in_channels=WIDTH, channels=WIDTH, embed_dims=WIDTH, num_heads=HEADS)
    known = {k: v for k, v in fitted.items() if k in config.decode_head}
    config.decode_head.update(known, num_classes=CLASSES)
    config.test_cfg.update(crop_size=(SIDE, SIDE), stride=(SIDE - 4, SIDE - 4))
    return drawn(MODELS.build(config))


def small(leaf: str, stride: int, **options: Any) -> Config:
    backbone = dict(img_size=(SIDE, SIDE), embed_dim=WIDTH, depth=2, num_heads=HEADS)
    backbone |= dict(model_name='vit_tiny_patch16_224', moe=None)
    test = {'model.test_cfg.crop_size': (SIDE, SIDE), 'model.test_cfg.stride': (stride, stride)}
    fitted = {f'model.backbone.{name}': value for name, value in backbone.items()}
    return load_config(str(ADE / f'{leaf}.py'), fitted | test | options)


def logits_of(model: Any, image: Tensor) -> Tensor:
    """From pixels to logits at another size, through preprocessor and windows."""
    shape = tuple(image.shape[1:])
    sample = SegDataSample(metainfo=dict(img_shape=shape, ori_shape=(50, 80)))
    with torch.no_grad():
        (result,) = model.test_step(dict(inputs=[image.clone()], data_samples=[sample]))
    return result.seg_logits.data


@pytest.mark.parametrize('shape', [(SIDE, SIDE), (SIDE, 117), (70, 101)])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('name', [MASK, LINEAR])
def test_files_of_mmseg_give_the_logits_of_mmseg(name, bias, shape, tmp_path):
    theirs = zoo_model(name, bias)
    path = str(tmp_path / 'theirs.pth')
    torch.save({'meta': {'CLASSES': ('wall',)}, 'state_dict': theirs.state_dict()}, path)
    ours = load_trained(small(MMSEG[name][0], SIDE - 4), path)
    image = torch.randint(256, (3, *shape), dtype=torch.uint8)
    expected = logits_of(theirs, image)
    assert expected.std() > 0.1
    # other kernels for attention: rounding of float32, over the few blocks
    torch.testing.assert_close(logits_of(ours, image), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize('mask', [True, False])
def test_files_of_the_authors_give_their_logits(mask, tmp_path):
    theirs = drawn(Original(mask))
    path = str(tmp_path / 'theirs.pth')
    torch.save({'model': theirs.state_dict(), 'n_cls': 150, 'epoch': 63}, path)
    linear = small(MMSEG[LINEAR][0], SIDE, **{'model.backbone.norm_eps': 1e-5})
    ours = load_trained(small(ORIGINAL, SIDE) if mask else linear, path)
    image = torch.randint(256, (3, SIDE, SIDE), dtype=torch.uint8)
    with torch.no_grad():
        window = theirs((image.flip(0)[None].float() - 127.5) / 127.5)
    expected = nn.functional.interpolate(window, (50, 80), mode='bilinear')[0]
    assert expected.std() > 0.1
    # rounding of float32; with the epsilon of timm's norms it is over 100 times as far
    torch.testing.assert_close(logits_of(ours, image), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize('name', MMSEG)
def test_names_shapes_and_protocol_of_the_zoo(name, monkeypatch):
    theirs = Config.fromfile(ZOO / f'{name}.py')
    theirs.model.pretrained = None
    theirs.model.backbone.patch_bias = True
    leaf, options = MMSEG[name]
    ours = load_config(str(ADE / f'{leaf}.py'), options)
    state = build(theirs, monkeypatch).state_dict()
    assert build(ours, monkeypatch).misfit(state) == ''
    assert ours.model.test_cfg == theirs.model.test_cfg
    fed, by_them = completed(ours.model.data_preprocessor)[0], theirs.model.data_preprocessor
    for field in ('mean', 'std', 'bgr_to_rgb'):
        assert fed[field] == by_them[field]
    steps = zip(*(c.test_dataloader.dataset.pipeline for c in (ours, theirs)), strict=True)
    for own, other in steps:
        assert own == {k: v for k, v in other.items() if k != 'reduce_zero_label'}
