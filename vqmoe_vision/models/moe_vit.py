"""Models of timm with MoE layers, whose experts are like the MLPs in whose place they stand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from timm.layers import Mlp, get_act_layer, register_notrace_module, to_2tuple
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, get_init_weights_vit
from torch import nn

from ..moe.config import MoeConfig, check, check_type, did_you_mean
from ..moe.experts import Experts
from ..moe.layer import MoeLayer
from ..moe.methods import METHODS
from ..moe.raw_patches import Host, RawPatchBlock, RawPatches, hand_over, raw_patch_parts
from .complexity import count_params, describe_params
from .upcycle import BEGINNING, Upcycling, read_upcycling

if TYPE_CHECKING:
    from .report import Report

# Which blocks hold an MoE layer unless a model is told otherwise.
MOE_LAYERS = 'every2'
_TYPES = get_type_hints(VisionTransformer.__init__)


class SparseModel:
    """Mixin before a class of timm's; `describe` is called once."""

    def describe(self, method: str, config: MoeConfig, upcycling: Upcycling | None) -> None:
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
        check(
            False, 'checkpoint_path', checkpoint_path, 'no file of NumPy, which dense models read'
        )

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
        _check_whole_patches(size, patch, padded)
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
        TypeError: If an argument is unknown, in timm's words.
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
        how = None if upcycling is None else read_upcycling(upcycling)
        check_method(method)
        names = METHODS[method].config.option_names()
        options = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        check_vit_arguments({**kwargs, 'fix_init': fix_init})
        for name, possible in (('scale_mlp_norm', (None, False)), ('mlp_layer', (None, Mlp))):
            allowed = f"one of {possible}, as in timm's Mlp, whose layout experts have"
            check(kwargs.get(name) in possible, name, kwargs.get(name), allowed)
        entry, dense, raw_patches = METHODS[method], dict(kwargs), RawPatches()
        if entry.read_patches is not None:
            kwargs.update(raw_patch_parts(raw_patches, kwargs))
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
                _set_draw(module, mode or self.weight_init_mode)
        super().init_weights(mode, needs_reset)

    @torch.no_grad()
    def fix_init_weight(self) -> None:
        """Rescale output layers by depth as timm does, those of experts too."""
        blocks: Any = self.blocks
        for i, block in enumerate(blocks):
            for layer in (block.attn.proj, getattr(block.mlp, 'experts', block.mlp).fc2):
                layer.weight.div_(_output_scale(i))

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


def build_layer(
    method: str,
    config: MoeConfig,
    host: Host,
    width: int,
    mlp_ratio: float,
    act_layer: Callable[[], nn.Module] = nn.GELU,
    bias: bool = True,
    drop: float = 0.0,
    weight_init: str = '',
    *,
    patch_drop_rate: float,
    **factory: Any,
) -> MoeLayer:
    """MoE layer of a method with experts that are like the MLPs of its model."""
    ratio = config.expert_mlp_ratio or mlp_ratio
    hidden = int(width * ratio)
    check(hidden >= 1, 'expert_mlp_ratio', ratio, 'wide enough for one hidden feature')
    experts = Experts(config.num_experts, width, hidden, act_layer, bias, drop, **factory)
    if weight_init:
        _set_draw(experts, weight_init)
        for linear in (experts.fc1, experts.fc2):
            linear.init_weights()
    layer = METHODS[method].build(width, config, experts, host, **factory)
    anywhere = layer.permutation_equivariant
    allowed = f'0, as {method} needs all patches of an image in their places'
    check(anywhere or patch_drop_rate == 0, 'patch_drop_rate', patch_drop_rate, allowed)
    # torch.fx, which timm's feature extraction uses, takes it as one operation
    register_notrace_module(type(layer))
    return layer


def host_of(model: Any, raw_patches: RawPatches) -> Host:
    """What a layer may know of the model that it is built for."""
    stem, prefix_tokens = model.patch_embed, model.num_prefix_tokens
    num_tokens = stem.num_patches + prefix_tokens
    return Host(num_tokens, prefix_tokens, stem.proj.in_channels, raw_patches)


@torch.no_grad()
def scale_fresh_experts(model: nn.Module) -> None:
    """Scale the output layers of experts that were just drawn, if timm does so with MLPs."""
    if not (isinstance(model, Eva) or getattr(model, 'fix_init', False)):
        return
    blocks: Any = model.blocks
    for i, block in enumerate(blocks):
        if isinstance(block.mlp, MoeLayer):
            block.mlp.experts.fc2.weight.div_(_output_scale(i))


def _output_scale(block: int) -> float:
    """What timm divides the output layers of a block by when it scales them by depth."""
    return float((2.0 * (block + 1)) ** 0.5)


def _set_draw(experts: Experts, weight_init: str) -> None:
    """Lets experts be drawn as timm draws MLPs."""
    # of which timm asks whether it is of an MLP
    draw = partial(get_init_weights_vit(weight_init), name='mlp') if weight_init else None
    experts.fc1.draw = experts.fc2.draw = draw


def resolve_moe_layers(moe_layers: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """Indices of the blocks that hold an MoE layer."""
    allowed = f"'everyN', 'lastN', or block indices, that select blocks of depth={depth}"
    chosen: Sequence[int] = ()
    if isinstance(moe_layers, str):
        match = re.fullmatch(r'(every|last)([1-9]\d*)', moe_layers)
        every_second = range(depth)[1::2]
        if match and match[1] == 'every':
            chosen = range(depth)[int(match[2]) - 1 :: int(match[2])]
        elif match and int(match[2]) <= len(every_second):
            chosen = every_second[-int(match[2]) :]
    elif isinstance(moe_layers, Sequence) and all(type(i) is int for i in moe_layers):
        chosen = sorted({*moe_layers})
    possible = len(chosen) > 0 and all(0 <= i < depth for i in chosen)
    check(possible, 'moe_layers', moe_layers, allowed)
    return tuple(chosen)


def check_method(method: Any, field: str = 'method') -> None:
    """Refuse a method that there is not."""
    hint = did_you_mean(method, METHODS) if isinstance(method, str) else ''
    allowed = f'one of {", ".join(METHODS)}{hint}'
    check(isinstance(method, str) and method in METHODS, field, method, allowed)


def moe_options(method: str) -> set[str]:
    """Names of the arguments that a model of a method has beyond timm's."""
    return {'moe_layers', *METHODS[method].config.option_names()}


def check_vit_arguments(kwargs: dict[str, Any]) -> None:
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
    skipped = kwargs.get('weight_init') == 'skip'
    check(not skipped, 'weight_init', 'skip', "'reset', skipping leaves embeddings uninitialised")
    width, ratio = kwargs.get('embed_dim', 768), kwargs.get('mlp_ratio', 4.0)
    check(int(width * ratio) >= 1, 'mlp_ratio', ratio, 'wide enough for one hidden feature')


def check_patches(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse a size whose last pixels timm would cut off."""
    embed: Any = getattr(model, 'patch_embed', None)
    size, patch = getattr(embed, 'img_size', None), getattr(embed, 'patch_size', None)
    if size is not None and patch is not None:
        padded = kwargs.get('dynamic_img_pad') and kwargs.get('dynamic_img_size')
        _check_whole_patches(kwargs.get('img_size', size), patch, bool(padded))


def _check_whole_patches(img_size: Any, patch_size: Any, padded: bool) -> None:
    (height, width), (rows, columns) = to_2tuple(img_size), to_2tuple(patch_size)
    check(
        padded or (height % rows == 0 and width % columns == 0),
        'img_size',
        img_size,
        f'a multiple of patch_size={rows}x{columns}, or any with both '
        'dynamic_img_size=True and dynamic_img_pad=True',
    )
