"""What a timm model with MoE layers has beyond its dense class."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.eva import Eva

from ..moe.config import MoeConfig
from .complexity import count_params, describe_params
from .state_dicts import Report
from .upcycle import Upcycling


class SparseModel:
    """Mixin before a class of timm's; `describe` is called once.

    No `nn.Module` itself: TorchScript would find the annotations of that class before timm's, which
    say what is constant. Annotations of its own would hide them too.

    Attributes:
        method: Key of `METHODS`.
        moe_config: Options of the method.
        upcycling: How experts are made of the MLPs of a dense model whose weights are loaded.
        weights_report: What became of each tensor when timm loaded weights, or when the model was
            converted; None if there was neither.
    """

    # TorchScript would compile it
    __jit_unused_properties__ = ('_model_args',)

    def describe(
        self, method: str, config: MoeConfig, upcycling: Upcycling, report: Report | None = None
    ) -> None:
        """Set what the model says of itself.

        Args:
            method: Key of `METHODS`.
            config: Its options.
            upcycling: How experts are made of dense MLPs.
            report: Of a conversion.
        """
        self.method, self.moe_config, self.upcycling = method, config, upcycling
        self.weights_report = report

    @property
    def _model_args(self) -> dict[str, Any]:
        """What timm's `create_model` was given, which it saves beside weights."""
        args: dict[str, Any] = self.__dict__.get('_given', {})
        return args

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        # a model that is built again for its saved weights does not start from others
        self._given = {k: v for k, v in args.items() if k not in ('upcycle', 'upcycling')}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not use weight decay."""
        timms: Any = super()
        names: set[str] = timms.no_weight_decay()
        model: Any = self
        for prefix, module in model.named_modules():
            if module is not self and hasattr(module, 'no_weight_decay'):
                names |= {f'{prefix}.{name}' for name in module.no_weight_decay()}
        return names

    def extra_repr(self) -> str:
        """Method and size, for print(model)."""
        model: Any = self
        return f'{self.method}: {describe_params(*count_params(model))}'


class MoeEva(SparseModel, Eva):
    """timm's `Eva`, of which DINOv3's models are, with MoE layers; `convert_to_moe` makes it."""
