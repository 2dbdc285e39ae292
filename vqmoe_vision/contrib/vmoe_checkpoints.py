"""Released V-MoEs of github.com/google-research/vmoe as models with SMoE layers, without JAX.

What their `VisionTransformerMoe` computes is what `vit_*_smoe` does, with the tanh form of GELU,
which is JAX's, and with kernels that are stored input first. A tree of weights says all sizes; how
many experts a token takes and how many tokens an expert does are in no file.

`NAME.index` has the tree, with the shape of each array and where its chunks are;
`NAME.data-00000-of-00008` and so on have the chunks. All are msgpack, and arrays in them are raw
bytes with a shape and the name of a type. Chunks know their array by its place among the leaves
of the tree, whose keys are sorted.

Legend: D width, H heads, d D / H, P patch height and width, C channels.
"""

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import torch
from timm.layers import to_2tuple
from torch import Tensor

from ..models.compat import StateDict, misfit, refuse_values, shorten, without
from ..models.create import create_model
from ..models.export import preprocessing_of, save
from ..models.fitting import replaced
from ..models.vit_moe import SIZES
from ..moe.config import check

__all__ = ['load_vmoe']

_STEM = 'embedding/kernel'
_POSITIONS = 'Encoder/posembed_input/pos_embedding'
_QUERY = 'Encoder/encoderblock_0/SelfAttention/query/kernel'
_EXPERTS = 'Moe/Mlp/Dense_0/kernel'

# What lies between the features and the head of models that were trained from scratch.
_REPRESENTATION = 'pre_logits/'
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
# Types of V-MoE's msgpack; a tree of weights has no others.
_ARRAY, _SLICES, _LEAF = 1, 6, 8
_CHUNKS = '__msgpack_array_chunk_a87ca2__'  # the key that says that a map holds chunks
_VERSION = '20220622'


def load_vmoe(checkpoint: str, head: bool = True, **options: Any) -> Any:
    """A released V-MoE as a `vit_*_smoe`, in eval mode.

    Args:
        checkpoint: Path of its files, without .index and .data-00000-of-00008.
        head: Whether to keep the classifier.
        **options: What no file says, such as `top_k` (2) and `eval_capacity_factor`.

    Raises:
        ValueError: The files are none of a V-MoE, or an option contradicts them.
    """
    tree = _read_tree(checkpoint)
    if not head:
        tree = without(tree, ('head/', _REPRESENTATION))
    name, arguments = arguments_of(tree, checkpoint)
    for option in arguments.keys() & options.keys():
        allowed = f'{arguments[option]!r}, which checkpoint {checkpoint!r} has'
        check(options[option] == arguments[option], option, options[option], allowed)
    channels, size = arguments['in_chans'], to_2tuple(arguments['img_size'])
    # of their evaluation: before fine-tuning, which changes the size, and after it
    cropped = {'crop_pct': 0.875, 'crop_mode': 'center'}
    overlay = {
        'input_size': (channels, *size),
        'mean': (0.5,) * channels,
        'std': (0.5,) * channels,
        'interpolation': 'bilinear',
        **(cropped if size == (224, 224) else {'crop_pct': 1.0, 'crop_mode': 'squash'}),
    }
    arguments = {'top_k': 2, **options, **arguments}  # as all released models
    model = create_model(name, pretrained_cfg_overlay=overlay, **arguments)
    state, expected = in_our_names(tree), model.state_dict()
    if problem := misfit(expected, state):
        raise ValueError(f'checkpoint {checkpoint!r} does not fit with {options}: {problem}')
    refuse_values(expected, state, checkpoint)
    model.load_state_dict(state)
    return model.eval()


def arguments_of(tree: StateDict, checkpoint: str) -> tuple[str, dict]:
    """The entry point of a tree and the keyword arguments that it says."""
    for name, dimensions in ((_STEM, 4), (_POSITIONS, 3), (_QUERY, 3)):
        found = tuple(tree[name].shape) if name in tree else ()
        if len(found) != dimensions:
            raise ValueError(
                f'checkpoint {checkpoint!r} is none of a V-MoE with learned positions: {name} is '
                f'{found}, with {dimensions} dimensions it would fit; it has {shorten(tree)}'
            )
    experts = [value for name, value in tree.items() if name.endswith(_EXPERTS)]
    where = f'checkpoint {checkpoint!r}'
    allowed = 'experts: timm itself loads what is of a dense ViT'
    check(bool(experts), f'{where} {_EXPERTS}', None, allowed)
    allowed = 'none before the head: without its head (--without-head, head=False) features fit'
    between = any(name.startswith(_REPRESENTATION) for name in tree)
    check(not between, f'{where} {_REPRESENTATION}kernel', 'a layer', allowed)
    rows, columns, channels, width = tree[_STEM].shape
    positions = tree[_POSITIONS].shape[1]
    side = math.isqrt(positions - 1)  # theirs are square
    allowed = 'those of a class token and a square of patches'
    check(positions == side**2 + 1, _POSITIONS, positions, allowed)
    blocks, moe = (
        sorted({int(match[1]) for name in tree if (match := re.search(pattern, name))})
        for pattern in (r'encoderblock_(\d+)/', r'block_(\d+)/Moe/')
    )
    # the widest size that is not wider; their S is wider than ours
    below = [name for name, size in SIZES.items() if size['embed_dim'] <= width]
    return f'vit_{below[-1] if below else next(iter(SIZES))}_smoe', {
        'img_size': side * rows if rows == columns else (side * rows, side * columns),
        'patch_size': rows if rows == columns else (rows, columns),
        'in_chans': channels,
        'embed_dim': width,
        'depth': blocks[-1] + 1,
        'num_heads': tree[_QUERY].shape[1],
        'mlp_ratio': experts[0].shape[-1] / width,
        'num_classes': tree['head/kernel'].shape[-1] if 'head/kernel' in tree else 0,
        'class_token': True,
        'global_pool': 'token',
        'act_layer': 'gelu_tanh',
        'num_experts': len(experts[0]),
        'moe_layers': moe,
    }


def in_our_names(tree: StateDict) -> StateDict:
    """A tree of V-MoE in the names and layouts of `vit_*_smoe`."""
    state = {replaced(name, _NAMES): _moved(name, value) for name, value in tree.items()}
    for name in [name for name in state if '.attn.query.' in name]:
        names = [name.replace('query', part) for part in ('query', 'key', 'value')]
        shapes = [state[each].shape for each in names if each in state]
        if len(shapes) == 3 and len(set(shapes)) == 1:  # otherwise they stay, and do not fit
            state[name.replace('query', 'qkv')] = torch.cat([state.pop(each) for each in names])
    return state


def _moved(name: str, value: Tensor) -> Tensor:
    if name == _STEM:
        return value.permute(3, 2, 0, 1)  # (P, P, C, D) -> (D, C, P, P)
    if '/SelfAttention/out/' not in name and '/SelfAttention/' in name:
        return value.flatten(-2).t() if name.endswith('kernel') else value.flatten()  # (D, H, d)
    if name.endswith('/SelfAttention/out/kernel'):
        value = value.flatten(0, 1)  # (H, d, D)
    return value.transpose(-2, -1) if name.endswith('kernel') else value


# What the index says of an array: its shape, its type, and the files that have parts of it.
_Leaf = tuple[tuple[int, ...], torch.dtype, list[int]]


def _read_tree(checkpoint: str) -> StateDict:
    """The weights of a checkpoint, by their path in the tree with slashes."""
    prefix = checkpoint.removesuffix('.index')
    count, leaves = _decoded(f'{prefix}.index', _index)
    parts: Any = defaultdict(dict)  # by their place among all leaves: chunks by their box
    for shard in sorted({shard for _, (*_, shards) in leaves for shard in shards}):
        for place, boxes in _decoded(f'{prefix}.data-{shard:05d}-of-{count:05d}', _chunks).items():
            parts[place].update(boxes)  # what several processes had is the same
    tree = {}
    for place, (name, (shape, dtype, _)) in enumerate(leaves):
        boxes = parts.pop(place, {})
        found, size = sum(chunk.numel() for chunk in boxes.values()), math.prod(shape)
        if found != size or any(chunk.dtype != dtype for chunk in boxes.values()):
            raise ValueError(
                f'checkpoint {checkpoint!r} is incomplete or damaged: of {name}, {shape} '
                f'{dtype}, the files have {found} of {size} values'
            )
        # where chunks overlap others are missing, and nan is refused later
        tree[name] = torch.full(shape, math.nan if dtype.is_floating_point else 0, dtype=dtype)
        for box, chunk in boxes.items():
            tree[name][tuple(slice(a, b) for a, b in box)] = chunk
    return tree


def _decoded(path: str, decode: Callable[[Any], Any]) -> Any:
    """What a file says, or one line about what is wrong with it."""
    if not Path(path).is_file():
        raise ValueError(
            f'{path!r} does not exist; a checkpoint of V-MoE is a file NAME.index and all files '
            'NAME.data-NNNNN-of-NNNNN beside it, and is called by NAME'
        )
    try:
        return decode(msgpack.unpackb(Path(path).read_bytes(), ext_hook=_extension))
    except Exception as error:  # bytes can fail in any way
        raise ValueError(
            f'{path!r} is truncated or damaged, or no file of V-MoE: {error}'
        ) from error


def _index(content: Any) -> tuple[int, list[tuple[str, _Leaf]]]:
    """Number of files, and the leaves in the order of the tree."""
    count, tree, version = content['shard_count'], content['index'], content.get('version')
    check(version in (None, _VERSION), 'version', version, f'{_VERSION!r} or none')
    return count, list(_flat(tree))


def _flat(tree: dict, prefix: str = '') -> Iterator[tuple[str, _Leaf]]:
    for key in sorted(tree):
        value, name = tree[key], f'{prefix}{key}'
        if isinstance(value, dict):
            yield from _flat(value, f'{name}/')
        elif isinstance(value, tuple):
            yield name, value
        elif value is not None:  # what JAX counts as no leaf either
            raise ValueError(f'{name} is no array')


def _chunks(content: Any) -> dict[int, dict[Any, Tensor]]:
    """Chunks by the place of their array, and by first and last index in each dimension of it."""
    check(content.pop(_CHUNKS, None) is True, _CHUNKS, None, 'in a file of chunks')
    return {
        int(place): {
            box: torch.cat(pieces).reshape([stop - start for start, stop in box])
            for pieces, box in chunks
        }
        for place, chunks in content.items()
    }


def _extension(code: int, data: bytes) -> Any:
    check(code in (_ARRAY, _SLICES, _LEAF), 'type of msgpack', code, 'one of weights')
    content = msgpack.unpackb(data, raw=True)
    if code == _SLICES:
        return tuple(tuple(msgpack.unpackb(each)[:2]) for each in content)
    shape, name, *_ = content if code == _ARRAY else msgpack.unpackb(content[0], raw=True)
    dtype = getattr(torch, name.decode())
    if code == _LEAF:
        return tuple(shape), dtype, content[2]
    # torch wants bytes that may be written to
    return torch.frombuffer(bytearray(content[2]), dtype=dtype).reshape(shape)


def convert_vmoe(argv: Sequence[str] | None = None) -> None:
    """Writes a V-MoE of JAX as a folder that timm reads."""
    from ..engine.cli import run
    from ..engine.config import add_config_options

    text = 'Write a released V-MoE of github.com/google-research/vmoe as a folder that timm reads.'
    parser = argparse.ArgumentParser(description=text)
    add = parser.add_argument
    add('checkpoint', help='path of its files without .index and .data-00000-of-00008')
    add('out', help='folder to write')
    add('--without-head', action='store_true', help='leave out the classifier, for the features')
    text = 'what no file says, for example top_k=2 eval_capacity_factor=1.5 (default: top_k=2)'
    add_config_options(parser, text)
    run(parser, argv, _convert)


def _convert(args: argparse.Namespace) -> None:
    from ..engine.publish import free_folder, written_whole

    target = free_folder(args.out)
    model = load_vmoe(args.checkpoint, head=not args.without_head, **args.cfg_options)
    config, method = model.pretrained_cfg, model.moe_config
    with written_whole(target) as folder:
        arguments = save(model, folder, preprocessing_of(config))
    blocks = ', '.join(map(str, arguments['moe_layers']))
    size = 'x'.join(map(str, model.patch_embed.img_size))
    print(
        f'wrote {target}: {config["architecture"]} with {method.num_experts} experts in blocks '
        f'{blocks}, images of {size} pixels, {model.num_classes} classes; '
        f'in no file, and so as given or by default: top_k={method.top_k}, '
        f'eval_capacity_factor={method.eval_capacity_factor}'
    )
