"""A loss that keeps the residual stream small: activation regularization (arXiv:1708.01009).

Legend: B images, N tokens, D embed_dim.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vqmoe_vision.models.hosts import Transformer
from vqmoe_vision.moe.config import check, check_type


def check_stream_loss(model: Any, options: dict[str, Any]) -> None:
    """Refuses a loss of the stream that cannot be."""
    whole = isinstance(options, dict) and options.keys() == {'weight', 'blocks'}
    check(whole, 'model.stream_loss', options, 'it takes weight and blocks, both')
    weight, blocks = options['weight'], options['blocks']
    check_type('model.stream_loss.weight', float, weight)
    check(0 < weight < math.inf, 'model.stream_loss.weight', weight, 'above 0 and finite')
    # other blocks have no such norm, or have it behind the MLP
    known = isinstance(model, Transformer) and all(
        isinstance(block, Block | EvaBlock) for block in model.blocks
    )
    check(known, 'model.stream_loss', options, 'left out, the blocks have no norm before the MLP')
    possible = range(len(model.blocks))
    listed = isinstance(blocks, list) and blocks and {type(i) for i in blocks} == {int}
    fits = listed and sorted(blocks) == [i for i in possible if i in blocks]
    check(bool(fits), 'model.stream_loss.blocks', blocks, f'a list of some of {[*possible]}')


@contextmanager
def watch_stream(model: Any, blocks: list[int]) -> Iterator[list[Tensor]]:
    """Reads the stream of every forward pass inside the block."""
    seen: list[Tensor] = []

    def keep(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0].float().square().mean())  # (B, N, D), which may be bfloat16

    hooks = [model.blocks[i].norm2.register_forward_pre_hook(keep) for i in blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
