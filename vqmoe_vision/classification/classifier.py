"""A classifier around any timm model."""

from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from vqmoe_vision.engine.model import MoeTrainingMixin, loss_entries
from vqmoe_vision.models.create import create_model


@MODELS.register_module()
class Classifier(MoeTrainingMixin, BaseModel):
    """Trains a timm model, dense or with MoE layers, on images and class labels.

    Auxiliary losses are added inside `forward`, and so inside what DDP wraps.

    Args:
        model_name: Name of a timm model.
        num_classes: Number of classes C.
        mixup: Keyword arguments of `timm.data.Mixup`, such as `mixup_alpha` and `cutmix_alpha`.
        label_smoothing: Share of the target that is spread over all classes.
        data_preprocessor: mmengine's; by default moves the batch to the device.
        moe: Options of the MoE layers, as `create_model`; a dense model takes None.
        extra_mlps: What a dense model is widened by, as `create_model`.
        **model_kwargs: Keyword arguments of `timm.create_model`.

    Raises:
        ValueError: The model cannot be built from these arguments.
        TypeError: The model does not know one of `model_kwargs`.
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        mixup: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        data_preprocessor: dict | nn.Module | None = None,
        moe: dict[str, Any] | None = None,
        extra_mlps: int = 0,
        **model_kwargs: Any,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.num_classes = num_classes
        self.model = create_model(
            model_name, moe, extra_mlps, num_classes=num_classes, **model_kwargs
        )
        self.mixup = None
        self.criterion: nn.Module
        if mixup is not None:
            self.mixup = Mixup(num_classes=num_classes, label_smoothing=label_smoothing, **mixup)
            self.criterion = SoftTargetCrossEntropy()
        elif label_smoothing:
            self.criterion = LabelSmoothingCrossEntropy(label_smoothing)
        else:
            self.criterion = nn.CrossEntropyLoss()

    def init_weights(self) -> None:
        """Does nothing: timm has initialised the model, mmengine would do it a second time."""

    @property
    def routed_model(self) -> nn.Module:
        """The timm model."""
        return self.model

    def forward(
        self, inputs: torch.Tensor, targets: torch.Tensor | None = None, mode: str = 'tensor'
    ) -> Any:
        """Logits, or what training needs.

        Args:
            inputs: (B, 3, H, W) normalised images.
            targets: (B,) class indices; only mode 'loss' looks at them.
            mode: 'tensor' and 'predict' give logits (B, C), 'loss' a dictionary of losses.

        Raises:
            ValueError: There is no such mode.
        """
        if mode == 'tensor':
            return self.model(inputs)
        if mode == 'predict':
            with self.collect():
                return self.model(inputs)
        if mode == 'loss':
            assert targets is not None
            return self.loss(inputs, targets)
        raise ValueError(f"mode={mode!r} must be 'tensor', 'predict' or 'loss'")

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each auxiliary loss, then the task's, then statistics that are only logged.

        Args:
            inputs: (B, 3, H, W) normalised images.
            targets: (B,) class indices.
        """
        if self.mixup is not None:
            inputs, targets = self.mixup(inputs, targets)
        with self.collect() as collected:
            logits = self.model(inputs)
            entries = loss_entries(collected)
        entries['cross_entropy_loss'] = self.criterion(logits, targets)
        if self.mixup is None:  # a mixed image has no single right answer
            entries['top1'] = (logits.argmax(1) == targets).float().mean() * 100
        return entries
