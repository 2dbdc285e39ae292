"""Segment scenes with an encoder alone, in the manner of EoMT (arXiv 2503.19108).

python examples/encoder_only_scenes.py [STEPS [SEED]]
"""

import sys

import timm
import torch
import torch.nn.functional as F
from scenes import CLASSES, ENCODER, fit, mean_iou
from timm.layers import LayerNorm2d, Mlp
from torch import Tensor, nn

import vqmoe_vision  # noqa: F401 - registers the models with timm


class EncoderOnly(nn.Module):
    """Queries join the tokens of a ViT before its last blocks; a mask is a product with its query.

    Unlike EoMT's there is a query per class, and no masked attention: the loss is that of pixels.

    Args:
        vit: A vision transformer of timm.
        classes: As many queries.
        last: Blocks that see the queries.
    """

    def __init__(self, vit: nn.Module, classes: int, last: int = 2) -> None:
        super().__init__()
        self.vit, self.first, width = vit, len(vit.blocks) - last, vit.embed_dim
        self.queries = nn.Parameter(torch.randn(classes, width) * 0.02)
        self.mask = Mlp(width, width, width)
        self.upscale = nn.Sequential(*(
            nn.Sequential(
                nn.ConvTranspose2d(width, width, 2, stride=2),
                nn.GELU(),
                nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                LayerNorm2d(width),
            )
            for _ in range(2)
        ))  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes, H, W) of images (B, 3, H, W)."""
        tokens = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(images)))
        for index, block in enumerate(self.vit.blocks):
            if index == self.first:
                queries = self.queries.expand(len(images), -1, -1)
                tokens = torch.cat([queries, tokens], 1)
            tokens = block(tokens)
        queries, tokens = self.vit.norm(tokens).tensor_split([len(self.queries)], 1)
        patches = tokens[:, self.vit.num_prefix_tokens :]
        maps = patches.mT.unflatten(-1, self.vit.patch_embed.grid_size)
        masks = torch.einsum('bqd,bdhw->bqhw', self.mask(queries), self.upscale(maps))
        return F.interpolate(masks, images.shape[-2:], mode='bilinear')


def build(name: str = 'vit_tiny_vqmoe') -> nn.Module:
    return EncoderOnly(timm.create_model(name, num_classes=0, **ENCODER), CLASSES)


def main(steps: int = 1000, seed: int = 0):
    torch.manual_seed(int(seed))
    model = build()
    collected = fit(model, int(steps), int(seed))
    print(f'mIoU {mean_iou(model):.1f}, losses {collected.losses}')
    return model, collected


if __name__ == '__main__':
    main(*sys.argv[1:])
