"""Segment scenes with DPT of segmentation_models_pytorch: python examples/smp_scenes.py [STEPS]"""

import sys

import segmentation_models_pytorch as smp
import torch
from scenes import CLASSES, ENCODER, fit, mean_iou

import vqmoe_vision  # noqa: F401 - registers the models with timm

CROP = 64  # DPT halves the patches of 8 pixels twice: it takes multiples of 32


def build(name: str = 'tu-vit_tiny_vqmoe') -> torch.nn.Module:
    width = dict(decoder_intermediate_channels=(32, 64, 96, 96), decoder_fusion_channels=64)
    # smp has a depth of its own, so that of the encoder stays twelve blocks
    sizes = {key: value for key, value in ENCODER.items() if key != 'depth'} | {'img_size': CROP}
    return smp.DPT(name, encoder_weights=None, classes=CLASSES, **width, **sizes)


def main(steps: int = 1000, seed: int = 0):
    torch.manual_seed(seed)
    model = build()
    collected = fit(model, int(steps), seed, CROP)
    print(f'mIoU {mean_iou(model, crop=CROP):.1f}, losses {collected.losses}')
    return model, collected


if __name__ == '__main__':
    main(*sys.argv[1:])
