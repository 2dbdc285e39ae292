"""Segment scenes with DPT of segmentation_models_pytorch.

python examples/smp_scenes.py [STEPS [SEED]]
"""

import sys

import segmentation_models_pytorch as smp
import timm
import torch
from scenes import CLASSES, ENCODER, fit, mean_iou

import vqmoe_vision  # noqa: F401 - registers the models with timm


def build(name: str = 'tu-vit_tiny_vqmoe') -> torch.nn.Module:
    # with three maps DPT takes crops of 48 pixels, with four multiples of 32
    maps = dict(encoder_depth=3, encoder_output_indices=(1, 2, 3))
    width = dict(decoder_intermediate_channels=(32, 64, 96), decoder_fusion_channels=64)
    # smp has a `depth` of its own, so that a shallow encoder is put in afterwards
    sizes = {key: value for key, value in ENCODER.items() if key != 'depth'}
    model = smp.DPT(name, encoder_weights=None, classes=CLASSES, **maps, **width, **sizes)
    model.encoder.model = timm.create_model(name.removeprefix('tu-'), num_classes=0, **ENCODER)
    return model


def main(steps: int = 1000, seed: int = 0):
    torch.manual_seed(int(seed))
    model = build()
    collected = fit(model, int(steps), int(seed))
    print(f'mIoU {mean_iou(model):.1f}, losses {collected.losses}')
    return model, collected


if __name__ == '__main__':
    main(*sys.argv[1:])
