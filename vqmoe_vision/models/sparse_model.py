"""Models of timm with MoE layers: what they have beyond their dense classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import get_act_layer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..moe.config import MoeConfig, check
from ..moe.experts import Experts
from ..moe.layer import MoeLayer
from ..moe.methods import METHODS
from ..moe.raw_patches import RawPatchBlock, RawPatches, hand_over, raw_patch_parts
from .arguments import (
    MOE_LAYERS,
    check_experts,
    check_method,
    check_names,
    check_patches,
    check_vit_arguments,
    check_whole_patches,
    named_failures,
    resolve_moe_layers,
)
from .complexity import count_params, describe_params
from .layers import build_layer, host_of, output_scale, set_draw
from .state_dicts import Report
from .upcycle import BEGINNING, Upcycling, read_upcycling
from .weight_files import is_of_numpy, unreadable


class SparseModel:
    """Mixin before a class of timm's; `describe` is called once."""

    def describe(self, method: str, config: MoeConfig, upcycling: Upcycling) -> None:
        """Set what the model says of itself."""
        self.method, self.moe_config, self.upcycling = method, config, upcycling
        self.weights_report: Report | None = None

    @property
    def _model_args(self) -> dict[str, Any]:
        """What timm's `create_model` was given, which it saves beside weights."""
        args: dict[str, Any] = self.__dict__.get('_given', {})
        return args

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        # a model that is built again for its saved weights does not start from others, and has no
        # option of a form that it was before
        left_out = {*BEGINNING, *self.moe_config.unused()}
        self._given = {k: v for k, v in args.items() if k not in left_out}

    def load_pretrained(self, checkpoint_path: str, prefix: str = '') -> None:
        """In the place of timm's, which reads NumPy's files and would stop at the first expert."""
        allowed = 'a file of NumPy, whose name ends so, for a dense model'
        check(is_of_numpy(checkpoint_path), 'checkpoint_path', checkpoint_path, allowed)
        raise ValueError(unreadable(checkpoint_path))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not use weight decay."""
        timms: Any = super()
        names: set[str] = timms.no_weight_decay()
        model: Any = self
        for prefix, module in model.named_modules():
            if module is not self and hasattr(module, 'no_weight_decay'):
                names |= {f'{prefix}.{name}' for name in module.no_weight_decay()}
        return names

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """As timm's; layers that go by the number of tokens hear of it."""
        timms: Any = super()
        model: Any = self
        embed = model.patch_embed
        size, patch = img_size or embed.img_size, patch_size or embed.patch_size
        padded = bool(embed.dynamic_img_pad and model.dynamic_img_size)
        check_whole_patches(size, patch, padded)
        timms.set_input_size(img_size, patch_size)
        num_tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        for module in model.modules():
            if hasattr(module, 'set_num_tokens'):
                module.set_num_tokens(num_tokens)
            if isinstance(module, MoeLayer):  # as which the model is built again
                self._model_args = {**self._model_args, **module.options_in_size(num_tokens)}

    def extra_repr(self) -> str:
        """Method and size, for print(model)."""
        model: Any = self
        return f'{self.method}: {describe_params(*count_params(model))}'


class MoeVisionTransformer(SparseModel, VisionTransformer):
    """timm's `VisionTransformer` with MoE layers in the place of some MLPs.

    Args:
        method: Key of `METHODS`.
        moe_layers: Which blocks are MoE, see `resolve_moe_layers`.
        fix_init: Rescale output layers by depth after they are initialised, as timm's option.
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
        fix_init: bool = False,
        upcycling: Upcycling | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        how = read_upcycling(upcycling)
        check_method(method)
        names = METHODS[method].config.option_names()
        options = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        check_names(kwargs, method)
        check_vit_arguments({**kwargs, 'fix_init': fix_init})
        check_experts(kwargs)
        entry, dense, raw_patches = METHODS[method], dict(kwargs), RawPatches()
        if entry.read_patches is not None:
            kwargs.update(raw_patch_parts(raw_patches, kwargs))
        with named_failures(VisionTransformer, kwargs, f'vit_*_{method}'):
            super().__init__(**kwargs)
        check_patches(self, kwargs)
        self.describe(method, entry.config.from_options(**options), how)
        factory = {name: kwargs.get(name) for name in ('device', 'dtype')}
        whole = {k: v for k, v in dense.items() if k != 'final_norm'} | {'num_classes': 0}
        raw_patches.read = entry.reader(
            self.moe_config, lambda: VisionTransformer(**whole), **factory
        )
        if raw_patches.read is not None:
            hand_over(self.patch_embed, raw_patches)
        for i in resolve_moe_layers(moe_layers, len(self.blocks)):
            self._replace_mlp(self.blocks[i], raw_patches, kwargs)
        self.fix_init = fix_init
        if fix_init:
            self.fix_init_weight()

    def _replace_mlp(self, block: Any, raw_patches: RawPatches, kwargs: dict[str, Any]) -> None:
        """Put a MoE layer in the place of a block's MLP, built by the arguments that made that."""
        block_fn = kwargs.get('block_fn')
        check(hasattr(block, 'mlp'), 'block_fn', block_fn, 'a block with an `mlp` to replace')
        block.mlp = build_layer(
            self.method,
            self.moe_config,
            host_of(self, raw_patches),
            self.embed_dim,
            kwargs.get('mlp_ratio', 4.0),
            act_layer=get_act_layer(kwargs.get('act_layer')) or nn.GELU,
            bias=kwargs.get('proj_bias', True),
            drop=kwargs.get('proj_drop_rate', 0.0),
            weight_init=self.weight_init_mode,
            patch_drop_rate=kwargs.get('patch_drop_rate', 0.0),
            device=kwargs.get('device'),
            dtype=kwargs.get('dtype'),
        )

    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """As timm's; experts as the MLPs in their place. Without a mode, as the model was built."""
        for module in self.modules():
            if isinstance(module, Experts):
                set_draw(module, mode or self.weight_init_mode)
        super().init_weights(mode, needs_reset)

    @torch.no_grad()
    def fix_init_weight(self) -> None:
        """Rescale output layers by depth as timm does, those of experts too."""
        blocks: Any = self.blocks
        for i, block in enumerate(blocks):
            for layer in (block.attn.proj, getattr(block.mlp, 'experts', block.mlp).fc2):
                layer.weight.div_(output_scale(i))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing."""
        if isinstance(self.blocks[0], RawPatchBlock):
            blocks: Any = self.blocks
            for block in blocks:
                block.grad_checkpointing = enable
        else:
            super().set_grad_checkpointing(enable)


class MoeEva(SparseModel, Eva):
    """timm's `Eva`, of which DINOv3's models are, with MoE layers; `convert_to_moe` makes it."""
