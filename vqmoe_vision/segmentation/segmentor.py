"""mmseg's encoder-decoder with the auxiliary losses of its backbone."""

from typing import Any

from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from torch import Tensor, nn

from vqmoe_vision.engine.model import MoeTrainingMixin, loss_entries

from .backbone import TimmViT


@MODELS.register_module()
class MoeEncoderDecoder(MoeTrainingMixin, EncoderDecoder):
    """An `EncoderDecoder` that trains what its `TimmViT` backbone routes.

    Auxiliary losses join mmseg's inside `forward`, and so inside what DDP wraps. Losses and
    statistics are named by the layers of the timm model: `blocks.1.mlp/balance_loss`.

    Args:
        **kwargs: As `EncoderDecoder`.

    Raises:
        ValueError: The backbone is not a `TimmViT`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(self.backbone, TimmViT):
            found = type(self.backbone).__name__
            raise ValueError(f"backbone.type={found!r} must be 'TimmViT'; others: EncoderDecoder")

    @property
    def routed_model(self) -> nn.Module:
        """The timm model in the backbone."""
        return self.backbone.model

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """Each auxiliary loss, then mmseg's losses and accuracy.

        Args:
            inputs: (B, 3, H, W) normalised images.
            data_samples: mmseg's samples with the label maps.
        """
        with self.collect() as collected:
            losses = super().loss(inputs, data_samples)
            return {**loss_entries(collected), **losses}

    def predict(self, inputs: Tensor, data_samples: list | None = None) -> list:
        """As mmseg's, and counts the routing.

        Args:
            inputs: (B, 3, H, W) normalised images.
            data_samples: mmseg's samples; None for bare images.
        """
        with self.collect():
            return super().predict(inputs, data_samples)
