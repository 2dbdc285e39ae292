"""Models of timm with MoE layers, whose experts are like the MLPs in whose place they stand."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_type_hints

import torch
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..moe import moe_layers
from ..moe.config import MoeConfig, check, check_type
from ..moe.experts import Experts
from ..moe.layer import MoeLayer
from ..moe.methods import METHODS
from ..moe.raw_patches import RawPatchBlock
from .layers import (
    MOE_LAYERS,
    Convertible,
    check_method,
    draw_as,
    image_size,
    output_scale,
    put_layers,
)
from .upcycle import BEGINNING, Upcycling, read_upcycling

_TYPES = get_type_hints(VisionTransformer.__init__)


class SparseModel:
    """Mixin before a class of timm's; `describe` is called once."""

    def describe(self, method: str, config: MoeConfig, upcycling: Upcycling | None) -> None:
        """Set what the model says of itself."""
        self.method, self.moe_config, self.upcycling = method, config, upcycling
        self.weights_report: Any = None  # a `Report`, of what was loaded

    @property
    def _model_args(self) -> dict:
        """What timm's `create_model` was given, which it saves beside weights."""
        return self.__dict__.get('_given', {})

    @_model_args.setter
    def _model_args(self, args: dict) -> None:
        # A model that is built again for its saved weights does not start from others, has no
        # option of a form that it was before, and keeps its options when defaults change.
        left_out = {*BEGINNING, 'preset', *self.moe_config.unused()}
        options = self.moe_config.effective_options()
        self._given = options | {k: v for k, v in args.items() if k not in left_out}

    def no_weight_decay(self: Any) -> set[str]:
        """Names of parameters that should not use weight decay."""
        names = super().no_weight_decay()  # type: ignore[misc]
        for prefix, module in self.named_modules():
            if module is not self and hasattr(module, 'no_weight_decay'):
                names |= {f'{prefix}.{name}' for name in module.no_weight_decay()}
        return names

    def extra_repr(self: Any) -> str:
        """Method and size, for print(model)."""
        return f'{self.method}: {describe_params(*count_params(self))}'


class SizedModel(SparseModel):
    """`SparseModel` of a class whose input size can be set."""

    def set_input_size(
        self: Any,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """As timm's; layers that go by the number of tokens hear of it."""
        embed = self.patch_embed
        size, patch = img_size or embed.img_size, patch_size or embed.patch_size
        padded = embed.dynamic_img_pad and getattr(self, 'dynamic_img_size', False)
        _check_whole_patches(size, patch, bool(padded))
        super().set_input_size(img_size, patch_size)  # type: ignore[misc]
        num_tokens = self.patch_embed.num_patches + self.num_prefix_tokens
        for module in self.modules():
            if hasattr(module, 'set_num_tokens'):
                module.set_num_tokens(num_tokens)
            if isinstance(module, MoeLayer):  # as which the model is built again
                self._model_args = {**self._model_args, **module.options_in_size(num_tokens)}


class MoeVisionTransformer(SizedModel, VisionTransformer):
    """timm's `VisionTransformer` with MoE layers in the place of some MLPs.

    Args:
        method: Key of `METHODS`.
        moe_layers: Which blocks are MoE, see `resolve_moe_layers`.
        upcycling: How experts are made of the MLPs of a dense model whose weights are loaded: an
            `Upcycling`, a dictionary of its options, or None for equal copies.
        **kwargs: Arguments of `VisionTransformer`, and options of the method.

    Raises:
        ValueError: If a value is impossible; names the field, the value and what is allowed.
        TypeError: If an argument is unknown.
    """

    def __init__(
        self,
        *,
        method: str,
        moe_layers: str | Sequence[int] = MOE_LAYERS,
        upcycling: Upcycling | dict | None = None,
        **kwargs: Any,
    ) -> None:
        how = None if upcycling is None else read_upcycling(upcycling)
        check_method(method)
        kind = METHODS[method].config
        options = {name: kwargs.pop(name) for name in kind.option_names() & kwargs.keys()}
        check_vit_arguments(kwargs)
        super().__init__(**kwargs)
        check_patches(self, kwargs)
        self.describe(method, kind.from_options(**options), how)
        # of what reads images
        plain = {k: v for k, v in kwargs.items() if k not in ('final_norm', 'fix_init')}
        dense = partial(VisionTransformer, **{**plain, 'num_classes': 0})
        put_layers(self, method, self.moe_config, moe_layers, dense)

    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """As timm's; experts as the MLPs in their place. Without a mode, as the model was built."""
        for module in self.modules():
            if isinstance(module, Experts):
                draw_as(module, mode or self.weight_init_mode)
        super().init_weights(mode, needs_reset)

    @torch.no_grad()
    def fix_init_weight(self: Any) -> None:
        """Rescale output layers by depth as timm does, those of experts too."""
        for i, block in enumerate(self.blocks):
            for layer in (block.attn.proj, getattr(block.mlp, 'experts', block.mlp).fc2):
                layer.weight.div_(output_scale(i))

    def set_grad_checkpointing(self: Any, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing."""
        if isinstance(self.blocks[0], RawPatchBlock):
            for block in self.blocks:
                block.grad_checkpointing = enable
        else:
            super().set_grad_checkpointing(enable)


def check_vit_arguments(kwargs: dict) -> None:
    """Refuse what timm's `VisionTransformer` would take in silence, and compute nonsense with."""
    for name, value in kwargs.items():
        if name not in _TYPES or value is None:
            continue
        check_type(name, _TYPES[name], value)
        if name.endswith('_rate'):
            # a model that drops every patch would have nothing to look at
            possible = 0 <= value < 1 or (value == 1 and name != 'patch_drop_rate')
            check(possible, name, value, 'from 0 to 1')
        elif _TYPES[name] is int:
            least = 0 if name in ('num_classes', 'reg_tokens') else 1
            check(value >= least, name, value, f'at least {least}')
        elif name in ('mlp_ratio', 'init_values'):
            check(math.isfinite(value), name, value, 'finite')
    check(
        kwargs.get('weight_init') != 'skip', 'weight_init', 'skip', "'reset', which draws them all"
    )
    width, ratio = kwargs.get('embed_dim', 768), kwargs.get('mlp_ratio', 4.0)
    check(int(width * ratio) >= 1, 'mlp_ratio', ratio, 'wide enough for one hidden feature')


def check_patches(model: nn.Module, kwargs: dict, published: tuple[int, ...] = ()) -> None:
    """Refuse a size whose last pixels timm would cut off, but for the size of published weights."""
    embed = getattr(model, 'patch_embed', None)
    size, patch = getattr(embed, 'img_size', None), getattr(embed, 'patch_size', None)
    size = kwargs.get('img_size', size)
    if size is None or patch is None:
        return
    if 'patch_size' in kwargs or to_2tuple(size) != published[-2:]:
        padded = kwargs.get('dynamic_img_pad') and kwargs.get('dynamic_img_size')
        _check_whole_patches(size, patch, bool(padded))


def _check_whole_patches(img_size: Any, patch_size: Any, padded: bool) -> None:
    (height, width), (rows, columns) = to_2tuple(img_size), to_2tuple(patch_size)
    check(
        padded or (height % rows == 0 and width % columns == 0),
        'img_size',
        img_size,
        f'a multiple of patch_size={rows}x{columns}, or any with both '
        'dynamic_img_size=True and dynamic_img_pad=True',
    )


@dataclass(frozen=True)
class Complexity:
    """Size and cost of a model.

    Args:
        params: Number of parameters.
        active_params: Parameters that one token uses.
        macs: Multiply-accumulates per image at the model's input size, of matrix products. What a
            capacity drops counts as if it were computed.
    """

    params: int
    active_params: int
    macs: int

    def __str__(self) -> str:
        params = describe_params(self.params, self.active_params)
        return f'{params}, {self.macs / 1e9:.3f} GMACs per image'


def complexity(model: Convertible) -> Complexity:
    """Count parameters, active parameters and MACs of a timm ViT, dense or with MoE layers.

    Args:
        model: The model; its current input size counts.

    Raises:
        ValueError: If `model` is none of timm's classes that take experts.
    """
    kind = type(model).__name__
    check(isinstance(model, Convertible), 'model', kind, 'a timm vision transformer')
    shape, dtype = (1, model.in_chans, *image_size(model)), next(model.parameters()).dtype
    images = torch.empty(shape, dtype=dtype, device='meta')
    weightless = copy.deepcopy(model).to('meta').eval().requires_grad_(False)
    for module in weightless.modules():  # a user's own, which need values
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        weightless(images)
    return Complexity(*count_params(model), counter.get_total_flops() // 2)


def count_params(model: nn.Module) -> tuple[int, int]:
    """Parameters of a model, and those that one token uses."""
    params = sum(p.numel() for p in model.parameters())
    active = params
    for layer in moe_layers(model).values():
        idle = max(layer.experts.num_experts - layer.experts_per_token, 0)
        active -= round(idle * layer.experts.params_per_expert())
    return params, active


def describe_params(params: int, active: int) -> str:
    """Both counts in words."""
    return f'{params / 1e6:.2f}M parameters, {active / 1e6:.2f}M active'
