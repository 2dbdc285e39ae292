"""Learning rates that shrink towards the first layers of the timm model."""

from typing import Any

from mmengine.model import is_model_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.optim import param_groups_layer_decay
from torch import nn

from vqmoe_vision.moe.config import check_type

from .optim import TimmOptimWrapperConstructor, undecayed_parameters


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(TimmOptimWrapperConstructor):
    """timm's layer-wise decay for the timm model, the full learning rate for heads beside it.

    The last layer has the full rate: the head of a classifier, or the last block and the norm of a
    backbone. The layer before has `layer_decay` times that, and so on down to the patch embedding.
    Biases, norms and `no_weight_decay()` names do not decay.

    Args:
        optim_wrapper_cfg: As in every mmengine config; `optimizer.lr` is the full rate.
        paramwise_cfg: `dict(layer_decay=...)`, above 0 and at most 1, and `custom_keys` as
            `TimmOptimWrapperConstructor`, whose factors come on top.

    Raises:
        ValueError: `paramwise_cfg` has other options, or no `layer_decay`; or there is no rate.
    """

    paramwise_options = ('layer_decay', 'custom_keys')

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        self.layer_decay = self.paramwise_cfg.get('layer_decay', 0.0)
        check_type('paramwise_cfg.layer_decay', float, self.layer_decay)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(
                f'paramwise_cfg={paramwise_cfg} must have layer_decay=x with 0 < x <= 1'
            )
        if 'lr' not in optim_wrapper_cfg['optimizer']:
            raise ValueError(
                f'paramwise_cfg.layer_decay={self.layer_decay} multiplies optimizer.lr, which is '
                'not set'
            )

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups of a model, which may be wrapped for distributed training.

        Args:
            model: A `MoeTrainingMixin`: a classifier, or a segmentor around a `TimmViT`.
            weight_decay: Weight decay of matrices.
        """
        whole: Any = model.module if is_model_wrapper(model) else model
        encoder = whole.routed_model
        groups = param_groups_layer_decay(
            encoder,
            weight_decay,
            no_weight_decay_list=undecayed_parameters(encoder),
            layer_decay=self.layer_decay,
        )
        rate = self.optim_wrapper_cfg['optimizer']['lr']
        for group in groups:
            group['lr'] = rate * group.pop('lr_scale')
        inside = {id(parameter) for parameter in encoder.parameters()}
        heads = super().param_groups(whole, weight_decay)
        for group in heads:
            group['params'] = [p for p in group['params'] if id(p) not in inside]
        return groups + [group for group in heads if group['params']]
