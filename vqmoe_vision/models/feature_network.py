"""The dense vision transformer by whose features a method of this package may decide."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..moe.config import check
from ..moe.image_reader import Features, reader_of

# Where what reads images stands in a model, and its network in that.
READER, NETWORK = 'patch_embed.reader.', 'network.'


class FeatureViT(VisionTransformer):
    """timm's `VisionTransformer` without a head, whose answer is the average over the patches."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Features of images, (B, D)."""
        tokens = self.forward_features(x, *args, **kwargs)
        features: Tensor = self.fc_norm(tokens[:, self.num_prefix_tokens :].mean(dim=1))
        return features

    def no_weight_decay(self) -> set[str]:
        """Nothing: it has buffers alone."""
        return set()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Height and width of its images and of its patches, in pixels."""
        stem: Any = self.patch_embed
        return (*stem.img_size, *stem.patch_size)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in whole patches, as images of a model that pads them come."""
        height, width, rows, columns = self.sizes
        return -(-height // rows) * rows, -(-width // columns) * columns

    def resize(self, sizes: tuple[int, ...]) -> None:
        """Take images and patches of other sizes, with weights that fit them."""
        height, width, rows, columns = sizes
        self.set_input_size((height, width), (rows, columns))


def feature_network(kwargs: dict[str, Any]) -> Features:
    """A network of the shape of a model, as initialised."""
    others = {name: value for name, value in kwargs.items() if name != 'final_norm'}
    return _described(FeatureViT(**{**others, 'num_classes': 0}))


def features_of(dense: VisionTransformer) -> Features:
    """A copy of a dense model that gives its features."""
    network: Any = copy.deepcopy(dense)
    network.__class__ = FeatureViT
    network.reset_classifier(0)
    network.set_grad_checkpointing(False)
    return _described(network)


def _described(network: VisionTransformer) -> Features:
    network.attn_pool = None  # type: ignore[assignment]  # as timm sets it where there is none
    return Features(network, network.embed_dim)


@torch.no_grad()
def fit_reader(model: nn.Module, batches: Iterable[Tensor]) -> str:
    """Fit what reads images in a model, such as clusters, to the images of a training set.

    The weights of its network come first. Trainings by config do all that themselves.

    Args:
        model: Any model whose method reads images by a frozen network; only that part is changed.
        batches: Images (B, channels, height, width) without augmentation, normalised as for the
            dense model.

    Returns:
        What was found, in words.

    Raises:
        ValueError: Nothing in the model has to be fitted, there are too few images, or a batch is
            something else.
    """
    reader = reader_of(model)
    device = reader.fitted.device
    features = []
    for images in batches:
        of_images = isinstance(images, Tensor) and images.ndim == 4
        check(of_images, 'batches', images, 'images alone, (B, channels, height, width)')
        features.append(reader.features(images.to(device)))
    check(bool(features), 'batches', batches, 'at least one')
    return reader.fit(torch.cat(features))
