"""The control with images: scenes of scanned digits, each patch in a hidden domain of its own.

An image has 4 x 4 of scikit-learn's digits, a patch each. Each patch lies in one of 32 domains: its
pixels are reordered, the contrast of about half of them is reversed, and digits have other labels.
A faint pattern on the pixels, another for each domain and at right angles to the others, tells
which it is. The mean of each pixel is taken out before, or it would tell as well.

The network is a vision transformer of two blocks, with experts in both. It is trained on scans of
the training split, and scored on those of the test split.

Legend: B images, N tokens per image, D pixels of a patch, C domains, L labels.
"""

from functools import partial
from typing import Any, ClassVar

import torch
from timm import create_model
from torch import Tensor, nn

from vqmoe_vision.engine.images import DIGITS, digit_scans

from .control import GRID, IMAGES, TOKENS, Bed, Clusters, Row, Source, Structure, as_images

DOMAINS, PIXELS = 32, 8
PATCH = PIXELS**2


class Scenes(Source):
    """Draws batches of scenes.

    The separation is the deviation of a domain's pattern over that of all pixels.
    """

    labels, layout = len(DIGITS), Clusters(DOMAINS)

    def lay_out(self) -> None:
        """Draw what each domain does to a patch."""
        shuffled = partial(torch.randperm, generator=self.generator)
        self.orders = torch.stack([shuffled(PATCH) for _ in range(DOMAINS)])  # (C, D)
        self.signs = self.normal(DOMAINS, PATCH).sign()  # (C, D)
        self.names = torch.stack([shuffled(self.labels) for _ in range(DOMAINS)])  # (C, L)
        # (C, D): the deviation of a pixel is 1
        self.patterns = torch.linalg.qr(self.normal(PATCH, PATCH))[0][:DOMAINS] * PIXELS
        scans = _scans('train')[0]
        self.mean, self.deviation = scans.mean(dim=0), (scans - scans.mean(dim=0)).std()
        self._use('train')

    def hold_out(self) -> None:
        """Draw of the test split."""
        self._use('test')

    def _use(self, split: str) -> None:
        scans, self.digits = _scans(split)
        self.scans = (scans - self.mean) / self.deviation

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (B, N, D), and the domain and the label of each, (B, N) int64."""
        drawn, shape = partial(torch.randint, generator=self.generator), (IMAGES, TOKENS)
        chosen, domains = drawn(len(self.scans), shape), drawn(DOMAINS, shape)
        patches = self.scans[chosen].gather(2, self.orders[domains]) * self.signs[domains]
        labels = self.names[domains].gather(2, self.digits[chosen][..., None]).squeeze(2)
        return patches + self.separation * self.patterns[domains], domains, labels


def _scans(split: str) -> tuple[Tensor, Tensor]:
    scans, digits = map(torch.from_numpy, digit_scans(split))
    return scans.flatten(1).float(), digits


class Network(Bed):
    """A vision transformer with a row's layers in its blocks, and a head on its patches."""

    width, hidden, pixels = 32, 8, PIXELS
    options: ClassVar = {'num_experts': DOMAINS}

    def __init__(self, row: Row) -> None:
        nn.Module.__init__(self)
        sizes = {'img_size': GRID * PIXELS, 'patch_size': PIXELS, 'embed_dim': self.width}
        told: Any = {'in_chans': 1, 'num_classes': 0, 'class_token': False, 'global_pool': ''}
        told |= {'depth': 2, 'num_heads': 4, **sizes}
        self.vit: Any = create_model('vit_tiny_patch16_224', **told)
        self.head = nn.Linear(self.width, Scenes.labels)
        made = self.layers(row)
        blocks: Any = self.vit.blocks
        for block in blocks:
            block.mlp = next(made)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Scores (B, N, L) of patches (B, N, D) and their domains (B, N)."""
        self.look(*batch)
        return self.head(self.vit.forward_features(as_images(batch[0], PIXELS)))


SCENES = Structure(Scenes, Network, ((0.3, 1.0), (0.3,)), ((1, 2, 3, 4, 5), (1,)), 1000)
