"""Any timm vision transformer, dense or with MoE layers, as a backbone of mmseg."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from timm.layers import LayerNorm
from torch import Tensor

from vqmoe_vision.engine.model import start_model
from vqmoe_vision.models.create import create_to_start
from vqmoe_vision.models.layers import MODULES
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe.config import check, check_type

_DEFAULTS = {
    'num_classes': 0,
    'global_pool': '',  # else the last norm would belong to the pooled features
    'dynamic_img_size': True,
    'dynamic_img_pad': True,
}


@MODELS.register_module()
class TimmViT(BaseModule):
    """Feature maps of a timm vision transformer, for images of any size.

    Images that do not fill the last patches are padded below and to the right; position embeddings
    are resized to the image. A map covers the padded image.

    Attributes:
        weights_normalization: How images were normalised for the weights that a training has
            started from; None before it starts, without weights, or if that is not known.

    Args:
        model_name: Name of a timm `VisionTransformer` or `Eva`, such as 'vit_small_vqmoe',
            'vit_small_patch16_224' or 'vit_small_patch16_dinov3'.
        out_indices: Blocks whose output is a feature map, in rising order, or one of them; -1 is
            the last, as is None. Later blocks are left out of the model.
        norm: Apply the final norm to every map.
        checkpoint: File to start from: of a classification or segmentation run of this package
            (.pth), of timm (.pth or .safetensors), of mmseg's ViT or of rstrudel/segmenter (.pth).
            Experts are made of the MLPs of a dense one. Read when training starts, not for tests.
        features: The same of a dense model of the same shape, for a method that decides by
            features of the image; None where the model starts from one.
        norm_eps: Added to the variance in every LayerNorm, at most 0.01; None for timm's.
        grad_checkpointing: Compute blocks again in the backward pass instead of storing them.
        moe: Options of the MoE layers, as `create_model`; None for a dense model.
        extra_mlps: What a dense model is widened by, as `create_model`.
        **model_kwargs: Keyword arguments of `timm.create_model`, such as `img_size` and
            `pretrained`; and `upcycling`, which a training refuses that starts from no weights.

    Raises:
        ValueError: The model or the blocks do not exist, the model is no vision transformer,
            or `norm_eps` is out of range.
        TypeError: The model does not know one of `model_kwargs`.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] | int | None = None,
        norm: bool = True,
        checkpoint: str | None = None,
        features: str | None = None,
        norm_eps: float | None = None,
        grad_checkpointing: bool = False,
        moe: dict | None = None,
        extra_mlps: int = 0,
        **model_kwargs: Any,
    ) -> None:
        super().__init__()
        arguments = {**_DEFAULTS, **model_kwargs}
        if norm_eps is not None:
            check_type('norm_eps', float, norm_eps)
            # beside variances of about 1 more would be no epsilon, but a forgotten minus
            check(0 < norm_eps <= 0.01, 'norm_eps', norm_eps, 'above 0 and at most 0.01, or None')
            arguments['norm_layer'] = partial(LayerNorm, eps=norm_eps)
        if timm.is_model(model_name):
            known = timm.models.is_model_in_modules(model_name, MODULES)
            check(known, 'model_name', model_name, "one of timm's VisionTransformers or Evas")
        self.model = create_to_start(model_name, moe, extra_mlps, **arguments)
        self._arguments = {'model_name': model_name, **arguments}
        depth = len(self.model.blocks)
        chosen = -1 if out_indices is None else out_indices
        blocks = [chosen] if isinstance(chosen, int) else chosen
        self.out_indices = [depth - 1 if block == -1 else block for block in blocks]
        rising = [i for i in range(depth) if i in self.out_indices] == self.out_indices != []
        check(rising, 'out_indices', out_indices, f'rising numbers from 0 to {depth - 1}')
        # parameters that no map depends on would have no gradient, which DDP does not allow
        self.model.prune_intermediate_layers(self.out_indices, prune_norm=not norm, prune_head=True)
        self.model.set_grad_checkpointing(grad_checkpointing)
        self.norm, self.checkpoint, self.features = norm, checkpoint, features
        self.weights_normalization: Normalization | None = None

    def init_weights(self) -> None:
        """Starts a new training: as every row does at this seed, or from weights."""
        self.weights_normalization = start_model(
            self.model, self._arguments, self.checkpoint, self.features
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Feature maps; (B, 3, H, W) -> (B, width, ceil(H / patch), ceil(W / patch)) each."""
        return tuple(
            self.model.forward_intermediates(
                x, indices=self.out_indices, norm=self.norm, intermediates_only=True
            )
        )
