"""Released V-MoEs of github.com/google-research/vmoe as models with SMoE layers.

What their `VisionTransformerMoe` computes is what `vit_*_smoe` does, with the tanh form of GELU,
which is JAX's, and with kernels that are stored input first. A tree of weights says all sizes; how
many experts a token takes and how many tokens an expert does are in no file.

Legend: D width, H heads, d D / H, F hidden width, E experts, N tokens with the class token,
P patch height and width, C channels.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor

from ..moe.config import check
from .compat import StateDict, misfit, refuse_values, shorten
from .create import create_model
from .fitting import replaced
from .moe_vit import MoeVisionTransformer
from .vit_moe import SIZES
from .vmoe_files import read_tree

Shape = tuple[int, ...]

_STEM = 'embedding/kernel'
_POSITIONS = 'Encoder/posembed_input/pos_embedding'
_QUERY = 'Encoder/encoderblock_0/SelfAttention/query/kernel'
_ROUTER, _EXPERTS = 'Moe/Router/dense/kernel', 'Moe/Mlp/Dense_0/kernel'
_TOP_K = 2  # of all released models
# What lies between the features and the head of models that were trained from scratch.
_REPRESENTATION = 'pre_logits/'
_HEADS = ('head/', _REPRESENTATION)
_NAMES = (
    (r'^embedding/', 'patch_embed.proj.'),
    (r'^cls$', 'cls_token'),
    (r'^Encoder/posembed_input/pos_embedding$', 'pos_embed'),
    (r'^Encoder/encoder_norm/', 'norm.'),
    (r'^head/', 'head.'),
    (r'^Encoder/encoderblock_(\d+)/', r'blocks.\1.'),
    (r'LayerNorm_0/', 'norm1.'),
    (r'LayerNorm_1/', 'norm2.'),
    (r'SelfAttention/out/', 'attn.proj.'),
    (r'SelfAttention/', 'attn.'),
    (r'Moe/Router/dense/', 'mlp.router.'),
    (r'Moe/Mlp/', 'mlp.experts.'),
    (r'Mlp/', 'mlp.'),
    (r'Dense_0/', 'fc1.'),
    (r'Dense_1/', 'fc2.'),
    (r'/', '.'),
    (r'(kernel|scale)$', 'weight'),
)


@dataclass(frozen=True)
class _Sizes:
    patch: Shape
    channels: int
    width: int
    tokens: int
    heads: int
    depth: int
    hidden: int
    experts: int
    moe_layers: tuple[int, ...]
    classes: int

    @property
    def images(self) -> Shape:
        """Height and width in pixels; theirs are square."""
        side = math.isqrt(self.tokens - 1)
        return side * self.patch[0], side * self.patch[1]


def load_vmoe(checkpoint: str, head: bool = True, **options: Any) -> MoeVisionTransformer:
    """A released V-MoE as a `vit_*_smoe`, in eval mode."""
    tree = read_tree(checkpoint)
    if not head:
        tree = {name: value for name, value in tree.items() if not name.startswith(_HEADS)}
    name, arguments = arguments_of(tree, checkpoint)
    for option in arguments.keys() & options.keys():
        allowed = f'{arguments[option]!r}, which checkpoint {checkpoint!r} has'
        same = _as_list(option, options[option]) == _as_list(option, arguments[option])
        check(same, option, options[option], allowed)
    overlay = _preprocessing(arguments)
    arguments = {'top_k': _TOP_K, **options, **arguments}
    model: Any = create_model(name, pretrained_cfg_overlay=overlay, **arguments)
    state = in_our_names(tree)
    expected = model.state_dict()
    if problem := misfit(expected, state):
        given = ', '.join(f'{name}={value!r}' for name, value in options.items())
        raise ValueError(f'{given} does not fit checkpoint {checkpoint!r}: {problem}')
    refuse_values(expected, state, checkpoint)
    model.load_state_dict(state)
    result: MoeVisionTransformer = model.eval()
    return result


def _as_list(option: str, value: Any) -> Any:
    """One form of what timm takes in two: a number or a pair, a list or a tuple."""
    if option in ('img_size', 'patch_size'):
        value = to_2tuple(value)
    return list(value) if isinstance(value, tuple) else value


def arguments_of(tree: StateDict, checkpoint: str) -> tuple[str, dict[str, Any]]:
    """The entry point of a tree and the keyword arguments that it says."""
    sizes = _sizes(tree, checkpoint)
    _refuse_other_tree(tree, _layout(sizes), checkpoint)
    height, width = sizes.images
    square = height == width
    return _entry_point(sizes.width), {
        'img_size': height if square else (height, width),
        'patch_size': sizes.patch[0] if square else sizes.patch,
        'in_chans': sizes.channels,
        'embed_dim': sizes.width,
        'depth': sizes.depth,
        'num_heads': sizes.heads,
        'mlp_ratio': sizes.hidden / sizes.width,
        'num_classes': sizes.classes,
        'class_token': True,
        'global_pool': 'token',
        'act_layer': 'gelu_tanh',
        'num_experts': sizes.experts,
        'moe_layers': list(sizes.moe_layers),
    }


def in_our_names(tree: StateDict) -> StateDict:
    """A tree of V-MoE in the names and layouts of `vit_*_smoe`."""
    state = {replaced(name, _NAMES): _moved(name, value) for name, value in tree.items()}
    for name in [name for name in state if '.attn.query.' in name]:
        parts = [state.pop(name.replace('query', part)) for part in ('query', 'key', 'value')]
        state[name.replace('query', 'qkv')] = torch.cat(parts)
    return state


def _moved(name: str, value: Tensor) -> Tensor:
    if name == _STEM:
        return value.permute(3, 2, 0, 1)  # (P, P, C, D) -> (D, C, P, P)
    if '/SelfAttention/out/' not in name and '/SelfAttention/' in name:
        return value.flatten(-2).t() if name.endswith('kernel') else value.flatten()  # (D, H, d)
    if name.endswith('/SelfAttention/out/kernel'):
        value = value.flatten(0, 1)  # (H, d, D)
    return value.transpose(-2, -1) if name.endswith('kernel') else value


def _sizes(tree: StateDict, checkpoint: str) -> _Sizes:
    """What the tree is of, as far as single tensors say it."""
    for name, dimensions in ((_STEM, 4), (_POSITIONS, 3), (_QUERY, 3)):
        if name not in tree or tree[name].ndim != dimensions:
            found = f'{name} is {tuple(tree[name].shape)}' if name in tree else f'no {name}'
            raise ValueError(
                f'checkpoint {checkpoint!r} is none of a V-MoE with learned positions: {found}, '
                f'with {dimensions} dimensions it would fit; it has {shorten(tree)}'
            )
    experts = [name for name in tree if name.endswith(_EXPERTS) and tree[name].ndim == 3]
    if not experts:
        raise ValueError(
            f'checkpoint {checkpoint!r} has no {_EXPERTS}: it is of a dense ViT, whose released '
            'form timm loads itself, and not of a V-MoE'
        )
    blocks = {int(match[1]) for name in tree if (match := re.search(r'encoderblock_(\d+)/', name))}
    moe = {int(match[1]) for name in tree if (match := re.search(r'block_(\d+)/Moe/', name))}
    num_experts, width, hidden = tree[experts[0]].shape
    for name in (name.replace(_EXPERTS, _ROUTER) for name in experts):
        routed = tree[name].shape[-1] if name in tree else num_experts
        if routed < num_experts and num_experts % routed == 0:
            raise ValueError(
                f'checkpoint {checkpoint!r} has {num_experts} experts and a router for {routed}, '
                'as the ensembles E3 do, which no method here is; a V-MoE would fit'
            )
    height, patch_width, channels, _ = tree[_STEM].shape
    tokens = tree[_POSITIONS].shape[1]
    if tokens < 2 or math.isqrt(tokens - 1) ** 2 != tokens - 1:
        raise ValueError(
            f'checkpoint {checkpoint!r} has {tokens} positions, which are not those of a class '
            'token and a square of patches'
        )
    return _Sizes(
        (height, patch_width), channels, width, tokens, tree[_QUERY].shape[1], max(blocks) + 1,
        hidden, num_experts, tuple(sorted(moe)),
        tree['head/kernel'].shape[-1] if 'head/kernel' in tree else 0,
    )  # fmt: skip


def _layout(sizes: _Sizes) -> dict[str, Shape]:
    """Names and shapes of all tensors of a V-MoE."""
    width, heads, hidden = sizes.width, sizes.heads, sizes.hidden
    split = (heads, width // heads)
    shapes: dict[str, Shape] = {
        'cls': (1, 1, width),
        _POSITIONS: (1, sizes.tokens, width),
        _STEM: (*sizes.patch, sizes.channels, width),
        'embedding/bias': (width,),
        'Encoder/encoder_norm/scale': (width,),
        'Encoder/encoder_norm/bias': (width,),
    }
    for i in range(sizes.depth):
        several = (sizes.experts,) if i in sizes.moe_layers else ()
        mlp = 'Moe/Mlp' if several else 'Mlp'
        block: dict[str, Shape] = {
            f'LayerNorm_{j}/{part}': (width,) for j in range(2) for part in ('scale', 'bias')
        }
        for part in ('query', 'key', 'value'):
            block |= {f'SelfAttention/{part}/kernel': (width, *split)}
            block |= {f'SelfAttention/{part}/bias': split}
        block |= {'SelfAttention/out/kernel': (*split, width), 'SelfAttention/out/bias': (width,)}
        for j, (inputs, outputs) in enumerate(((width, hidden), (hidden, width))):
            block |= {f'{mlp}/Dense_{j}/kernel': (*several, inputs, outputs)}
            block |= {f'{mlp}/Dense_{j}/bias': (*several, outputs)}
        if several:
            block[_ROUTER] = (width, sizes.experts)
        shapes |= {f'Encoder/encoderblock_{i}/{name}': shape for name, shape in block.items()}
    if sizes.classes:
        shapes |= {'head/kernel': (width, sizes.classes), 'head/bias': (sizes.classes,)}
    return shapes


def _refuse_other_tree(tree: StateDict, layout: dict[str, Shape], checkpoint: str) -> None:
    """Refuse a tree with other tensors than a V-MoE of its sizes has."""
    if any(name.startswith(_REPRESENTATION) for name in tree):
        raise ValueError(
            f'checkpoint {checkpoint!r} has {_REPRESENTATION}kernel, a layer and a tanh before the '
            "head, which timm's VisionTransformer does not have: without its head "
            '(--without-head, head=False) its features fit, and so does a fine-tuned model with it'
        )
    shapes = {name: torch.empty(shape, device='meta') for name, shape in layout.items()}
    if problem := misfit(shapes, tree):
        raise ValueError(f'checkpoint {checkpoint!r} is no V-MoE of one size throughout: {problem}')


def _entry_point(width: int) -> str:
    """The name of the widest size that is not wider; their S is wider than ours."""
    below = [name for name, size in SIZES.items() if size['embed_dim'] <= width]
    return f'vit_{below[-1] if below else next(iter(SIZES))}_smoe'


def _preprocessing(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of their evaluation: before fine-tuning, which changes the size, and after it."""
    channels, size = arguments['in_chans'], to_2tuple(arguments['img_size'])
    middle = size == (224, 224)
    return {
        'input_size': (channels, *size),
        'mean': (0.5,) * channels,
        'std': (0.5,) * channels,
        'crop_pct': 0.875 if middle else 1.0,
        'crop_mode': 'center' if middle else 'squash',
        'interpolation': 'bilinear',
    }
