"""V-MoEs as JAX has them: trees of weights, their files, and what the network computes.

Written from the published code and configs of github.com/google-research/vmoe, and apart from ours:
nothing here imports the converter.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgpack
import torch
import torch.nn.functional as F
from torch import Tensor

Tree = dict[str, Tensor]
# of `get_vmoe_config`, by the letter of a description such as 'ViT-B/16, E=8, K=2, Every 2'
S32 = {'width': 512, 'depth': 8, 'heads': 8, 'hidden': 2048, 'patch': 32, 'moe_layers': (5, 7)}
B16 = {'width': 768, 'depth': 12, 'heads': 12, 'hidden': 3072, 'patch': 16}
B16['moe_layers'] = range(1, 12, 2)
TINY = {'width': 32, 'depth': 3, 'heads': 4, 'hidden': 48, 'patch': 4, 'moe_layers': (0, 2)}
TINY |= {'experts': 4, 'image': 16, 'classes': 10}


def make_tree(
    *, width: int, depth: int, heads: int, hidden: int, patch: int, moe_layers: Sequence[int],
    image: int, classes: int, experts: int = 8, representation: bool = False, device: str = 'cpu',
) -> Tree:  # fmt: skip
    """Parameters of `VisionTransformerMoe`, drawn so that every one of them matters."""
    tree: Tree = {}

    def draw(name: str, *shape: int, std: float = 0.1, mean: float = 0.0) -> None:
        random = torch.Generator().manual_seed(len(tree)) if device == 'cpu' else None
        tree[name] = mean + std * torch.randn(shape, generator=random, device=device)

    def dense(name: str, inputs: int, outputs: int, *several: int) -> None:
        draw(f'{name}/kernel', *several, inputs, outputs, std=inputs**-0.5)
        draw(f'{name}/bias', *several, outputs)

    def norm(name: str) -> None:
        draw(f'{name}/scale', width, mean=1.0)
        draw(f'{name}/bias', width)

    draw('cls', 1, 1, width)
    draw('embedding/kernel', patch, patch, 3, width)
    draw('embedding/bias', width)
    draw('Encoder/posembed_input/pos_embedding', 1, (image // patch) ** 2 + 1, width)
    for i in range(depth):
        block = f'Encoder/encoderblock_{i}'
        norm(f'{block}/LayerNorm_0')
        for part in ('query', 'key', 'value'):
            draw(f'{block}/SelfAttention/{part}/kernel', width, heads, width // heads)
            draw(f'{block}/SelfAttention/{part}/bias', heads, width // heads)
        draw(f'{block}/SelfAttention/out/kernel', heads, width // heads, width)
        draw(f'{block}/SelfAttention/out/bias', width)
        norm(f'{block}/LayerNorm_1')
        mlp, several = (f'{block}/Moe/Mlp', (experts,)) if i in moe_layers else (f'{block}/Mlp', ())
        dense(f'{mlp}/Dense_0', width, hidden, *several)
        dense(f'{mlp}/Dense_1', hidden, width, *several)
        if several:
            draw(f'{block}/Moe/Router/dense/kernel', width, experts, std=0.3)
    norm('Encoder/encoder_norm')
    if representation:
        dense('pre_logits', width, width)
    dense('head', width, classes)
    return tree


def forward(
    tree: Tree, images: Tensor, top_k: int, capacity: int | None = None, dtype: Any = torch.float64
) -> Tensor:
    """Logits of images (B, H, W, C), as the einsums of JAX and a loop over tokens have them."""
    p = {name: value.to(dtype) for name, value in tree.items()}
    kernel = p['embedding/kernel']
    size = kernel.shape[0]
    patches = images.to(dtype).unfold(1, size, size).unfold(2, size, size)  # (B, h, w, C, P, P)
    x = torch.einsum('bhwcpq,pqcd->bhwd', patches, kernel) + p['embedding/bias']
    x = torch.cat([p['cls'].expand(len(x), -1, -1), x.flatten(1, 2)], dim=1)
    x = x + p['Encoder/posembed_input/pos_embedding']
    depth = 1 + max(int(name.split('_')[1].split('/')[0]) for name in p if 'encoderblock_' in name)
    for i in range(depth):
        block = f'Encoder/encoderblock_{i}'
        x = x + _attention(p, f'{block}/SelfAttention', _norm(p, f'{block}/LayerNorm_0', x))
        y = _norm(p, f'{block}/LayerNorm_1', x)
        if f'{block}/Mlp/Dense_0/kernel' in p:
            x = x + _mlp(p, f'{block}/Mlp', y)
        else:
            rows = y.reshape(-1, y.shape[-1])
            x = x + _experts(p, f'{block}/Moe', rows, top_k, capacity).reshape(y.shape)
    x = _norm(p, 'Encoder/encoder_norm', x)[:, 0]
    return x @ p['head/kernel'] + p['head/bias'] if 'head/kernel' in p else x


def _norm(p: Tree, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f'{name}/scale'], p[f'{name}/bias'], 1e-6)


def _attention(p: Tree, name: str, x: Tensor) -> Tensor:
    q, k, v = (
        torch.einsum('bnd,dhk->bnhk', x, p[f'{name}/{part}/kernel']) + p[f'{name}/{part}/bias']
        for part in ('query', 'key', 'value')
    )
    weights = torch.einsum('bqhk,bnhk->bhqn', q / math.sqrt(q.shape[-1]), k).softmax(-1)
    mixed = torch.einsum('bhqn,bnhk->bqhk', weights, v)
    return torch.einsum('bqhk,hkd->bqd', mixed, p[f'{name}/out/kernel']) + p[f'{name}/out/bias']


def _mlp(p: Tree, name: str, x: Tensor, expert: int | None = None) -> Tensor:
    layers = [[p[f'{name}/Dense_{j}/{part}'] for part in ('kernel', 'bias')] for j in range(2)]
    if expert is not None:
        layers = [[value[expert] for value in layer] for layer in layers]
    (first, b1), (second, b2) = layers
    # jax.nn.gelu, whose default is the approximation
    return F.gelu(x @ first + b1, approximate='tanh') @ second + b2


def _experts(p: Tree, name: str, rows: Tensor, top_k: int, capacity: int | None) -> Tensor:
    """All tokens as one group; first choices first, tokens in order, without batch priority."""
    gates = (rows @ p[f'{name}/Router/dense/kernel']).softmax(-1)
    chosen = gates.topk(top_k).indices.tolist()
    taken = [0] * gates.shape[1]
    result = torch.zeros_like(rows)
    for k in range(top_k):
        for token, row in enumerate(rows):
            expert = chosen[token][k]
            taken[expert] += 1
            if capacity is None or taken[expert] <= capacity:
                result[token] += gates[token, expert] * _mlp(p, f'{name}/Mlp', row, expert)
    return result


def padded_capacity(tokens: int, experts: int, top_k: int, factor: float) -> int:
    """Places of an expert: theirs are a multiple of four."""
    return 4 * math.ceil(math.ceil(tokens * top_k * factor / experts) / 4)


def write_files(prefix: Path, tree: Tree, shards: int = 2, version: Any = '20220622') -> None:
    """A checkpoint in V-MoE's files: arrays are halved, and halves lie in different shards."""
    nested: dict[str, Any] = {}
    for name, value in tree.items():
        *folders, last = name.split('/')
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    files: list[dict[str, Any]] = [{CHUNKS: True} for _ in range(shards)]
    index: dict[str, Any] = {'shard_count': shards, 'index': _indexed(nested, files, [0])}
    if version is not None:
        index['version'] = version
    Path(f'{prefix}.index').write_bytes(_packed(index))
    for shard, content in enumerate(files):
        shard_file(prefix, shard, shards).write_bytes(_packed(content))


CHUNKS = '__msgpack_array_chunk_a87ca2__'


def shard_file(prefix: Path, shard: int = 0, shards: int = 2) -> Path:
    return Path(f'{prefix}.data-{shard:05d}-of-{shards:05d}')


def _packed(content: Any) -> bytes:
    return msgpack.packb(content, strict_types=True)


def _indexed(node: Any, files: list[dict[str, Any]], place: list[int]) -> Any:
    """The index of a tree, whose chunks go into the files; leaves are counted by sorted keys."""
    if isinstance(node, dict):
        indexed = {key: _indexed(node[key], files, place) for key in sorted(node)}
        return {key: indexed[key] for key in node}
    halves = len(node) // 2 if node.ndim else 0
    cuts = [0, halves, len(node)] if halves else [0, len(node)] if node.ndim else []
    rest = [(0, length) for length in node.shape[1:]]
    boxes = [[(a, b), *rest] for a, b in pairwise(cuts)] or [[]]
    homes = []
    for i, box in enumerate(boxes):
        homes.append((place[0] + i) % len(files))
        chunk = node[tuple(slice(a, b) for a, b in box)].flatten()
        pieces = [_array(piece) for piece in chunk.tensor_split(2)[: chunk.numel()]]
        entry = [pieces, msgpack.ExtType(6, _slices(box))]
        files[homes[-1]].setdefault(str(place[0]), []).append(entry)
    place[0] += 1
    dtype = str(node.dtype).removeprefix('torch.')
    shaped = msgpack.packb((tuple(node.shape), dtype, False, {}))
    leaf = msgpack.packb((shaped, [_slices(box) for box in boxes], homes))
    return msgpack.ExtType(8, leaf)


def _slices(box: Sequence[tuple[int, int]]) -> bytes:
    return msgpack.packb([msgpack.packb((a, b, None)) for a, b in box])


def _array(values: Tensor) -> msgpack.ExtType:
    dtype = str(values.dtype).removeprefix('torch.')
    raw = values.contiguous().view(torch.uint8).numpy().tobytes()
    return msgpack.ExtType(1, msgpack.packb((tuple(values.shape), dtype, raw)))
