"""A classifier around any timm model."""

from typing import Any

import timm
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

import vqmoe_vision  # noqa: F401  registers the models with timm
from vqmoe_vision.engine.model import MoeTrainingMixin, loss_entries


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
        **model_kwargs: Any,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.num_classes = num_classes
        self.model = create_model(model_name, num_classes=num_classes, **model_kwargs)
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


def create_model(model_name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with errors that name what was asked for.

    Args:
        model_name: Name of a timm model.
        **kwargs: Its keyword arguments.

    Raises:
        ValueError: There is no such model, or the arguments do not go together.
        TypeError: The model does not know one of the arguments.
    """
    if not timm.is_model(model_name):
        raise ValueError(f'model_name={model_name!r} is not a timm model; see timm.list_models()')
    size, patch = kwargs.get('img_size'), kwargs.get('patch_size')
    # timm would cut off the pixels that do not fill a patch
    if isinstance(size, int) and isinstance(patch, int) and size % patch:
        raise ValueError(f'img_size={size} must be a multiple of patch_size={patch}')
    width, heads = kwargs.get('embed_dim'), kwargs.get('num_heads')
    if width is not None and heads is not None and width % heads:
        raise ValueError(f'embed_dim={width} must be a multiple of num_heads={heads}')
    try:
        return timm.create_model(model_name, **kwargs)
    except AssertionError as error:
        raise ValueError(f'{model_name} cannot be built with {kwargs}: {error}') from error
