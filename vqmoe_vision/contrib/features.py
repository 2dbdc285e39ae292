"""A dense vision transformer that tells what it sees in an image, and learns nothing."""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


class FeatureViT(VisionTransformer):
    """timm's `VisionTransformer` without a head, whose answer is the average over the patches."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Features of images, (B, D)."""
        tokens = self.forward_features(x, *args, **kwargs)
        return self.fc_norm(tokens[:, self.num_prefix_tokens :].mean(dim=1))

    @property
    def sizes(self: Any) -> tuple[int, ...]:
        """Height and width of its images and of its patches, in pixels."""
        return (*self.patch_embed.img_size, *self.patch_embed.patch_size)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in whole patches, as images of a model that pads them come."""
        height, width, rows, columns = self.sizes
        return -(-height // rows) * rows, -(-width // columns) * columns


def giving_features(network: Any) -> Any:
    """A dense model of timm gives its features from now on; any other network is as it is."""
    if isinstance(network, VisionTransformer):
        network.__class__ = FeatureViT
        network.reset_classifier(0)
        network.set_grad_checkpointing(False)
        network.attn_pool = None  # type: ignore[assignment]  # as timm where there is none
    return network


@torch.no_grad()
def resized(network: Any, sizes: tuple[int, ...]) -> Any:
    """The network for images and patches of these sizes."""
    if sizes != network.sizes:
        network.set_input_size(sizes[:2], sizes[2:])
    return frozen(network)


def frozen(network: Any) -> Any:
    """The network with buffers in the place of parameters."""
    # a parameter that never gets a gradient is decayed, and data-parallel training waits for it
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())
    return network
