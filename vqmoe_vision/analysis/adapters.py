"""What the layers of experts of any model decide: an adapter is a function from a module to it.

This package's layers are recorded by their own recorder. Others are watched where they choose, or
at what is chosen; no library is imported for that.

Legend: B images or texts, N tokens of each, T tokens of all, D width, E experts, C capacity,
K experts per token, P slots per expert.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vqmoe_vision.moe import MoeLayer, moe_layers
from vqmoe_vision.moe.config import check

from .record import LayerRecord, evaluating, record_layers

# Arguments by place and by name, and the answer, as a record whose tensors lie as they came: those
# of tokens (B, N, D), (T, D) or (N, B, D).
Reads = Callable[[tuple, dict, Any], LayerRecord]


def called_experts(module: Any) -> Reads | None:
    """Experts of transformers, which are called with the indices of those that are chosen."""
    arguments = inspect.signature(module.forward)
    if 'top_k_index' not in arguments.parameters:
        return None

    def read(args: tuple, kwargs: dict, answer: Any) -> LayerRecord:
        tokens, experts, weights = arguments.bind(*args, **kwargs).args[:3]
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        return _of_router(tokens, module.num_experts, experts.gather(-1, order), weights)

    return read


def dispatching_gate(module: Any) -> Reads | None:
    """The gate of st-moe-pytorch, which answers with dispatch and combine tensors (B, N, E, C)."""
    if not _is(module, 'st_moe_pytorch', 'TopNGating'):
        return None

    def read(args: tuple, kwargs: dict, answer: Any) -> LayerRecord:
        shares = answer[1].sum(dim=-1)
        weights, experts = shares.topk(module.top_n)
        experts = experts.masked_fill(weights == 0, -1)
        return _of_router(args[0], shares.shape[-1], experts, weights)

    return read


def soft_slots(module: Any) -> Reads | None:
    """The layer of soft-moe-pytorch, whose weights are computed again from its tokens."""
    if not _is(module, 'soft_moe_pytorch', 'SoftMoE'):
        return None

    def read(args: tuple, kwargs: dict, answer: Any) -> LayerRecord:
        tokens = args[0].flatten(2).mT if args[0].ndim == 4 else args[0]
        logits = torch.einsum(
            'bnd,esd->bnes', module.norm(tokens), module.slot_norm(module.slot_embeds)
        )
        dispatch, combine = logits.softmax(dim=1), logits.flatten(2).softmax(dim=-1)
        number = logits.shape[2]
        return LayerRecord(number, tokens, None, dispatch=dispatch, combine=combine.view_as(logits))

    return read


def quantizer(module: Any) -> Reads | None:
    """A codebook of vector-quantize-pytorch with an index per token."""
    size = getattr(module, 'codebook_size', None)
    if not _is(module, 'vector_quantize_pytorch', type(module).__name__) or size is None:
        return None
    return lambda args, kwargs, answer: LayerRecord(
        0, args[0], None, codes={'codebook': answer[1]}, num_codes=int(size)
    )


def scores(module: nn.Module, top_k: int) -> Reads:
    """A router that answers with a score per expert, (..., E)."""

    def read(args: tuple, kwargs: dict, answer: Any) -> LayerRecord:
        check(isinstance(answer, Tensor), 'router', type(answer).__name__, 'a score per expert')
        check(top_k <= answer.shape[-1], 'top_k', top_k, f'up to {answer.shape[-1]} experts')
        weights, experts = answer.float().softmax(dim=-1).topk(top_k)
        return _of_router(args[0], answer.shape[-1], experts, weights)

    return read


ADAPTERS = (called_experts, dispatching_gate, soft_slots, quantizer)
_LAYERS = (soft_slots, quantizer)  # of these the module is the layer, of others its parent


def _is(module: nn.Module, package: str, name: str) -> bool:
    kind = type(module)
    return kind.__module__.split('.')[0] == package and kind.__name__ == name


def _of_router(tokens: Tensor, number: int, experts: Tensor, weights: Tensor) -> LayerRecord:
    return LayerRecord(number, tokens, None, {'router': experts}, {'router': weights})


def readers(model: nn.Module, router: str, top_k: int) -> Iterator[tuple[str, nn.Module, Reads]]:
    """Layer, module and what reads it, of all layers that are not this package's."""
    # what is inside of these is theirs
    whole = tuple(f'{n}.' for n, m in model.named_modules() if isinstance(m, MoeLayer))
    seen: set[str] = set()
    for adapter in (*ADAPTERS, None):  # what is known comes before what has a name
        for name, module in model.named_modules():
            by_name = bool(name) and fnmatchcase(f'.{name}', router) | fnmatchcase(name, router)
            layer = name if adapter in _LAYERS else name.rpartition('.')[0]
            layer = layer or type(model).__name__
            read = scores(module, top_k) if adapter is None and by_name else None
            read = read if adapter is None else adapter(module)
            if read is not None and layer not in seen and not f'{name}.'.startswith(whole):
                yield layer, module, read
                seen.add(layer)
                whole = (*whole, f'{name}.') if adapter in _LAYERS and name else whole


def decisions(
    model: nn.Module, images: Tensor, router: str = '*.gate', top_k: int = 2
) -> dict[str, LayerRecord]:
    """Runs a model in eval mode: what its layers decided by their name; it is left as it was."""
    records: dict[str, LayerRecord] = {}

    def keep(layer: str, read: Reads, _: Any, args: tuple, kwargs: dict, answer: Any) -> None:
        records[layer] = _by_image(layer, read(args, kwargs, answer), len(images))

    with ExitStack() as stack:
        if moe_layers(model):
            records = stack.enter_context(record_layers(model))
        for layer, module, read in readers(model, router, top_k):
            hook = partial(keep, layer, read)
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        stack.enter_context(evaluating(model))
        model(images.to(next(model.parameters(), images).device))
    allowed = f'one with layers of experts, this is dense, and no {router} is in it'
    check(bool(records), 'model', type(model).__name__, allowed)
    return records


def _by_image(layer: str, seen: LayerRecord, batch: int) -> LayerRecord:
    tokens = seen.inputs
    count = tokens[..., 0].numel()
    check(count % batch == 0, f'{layer}: tokens', count, f'a multiple of {batch} images')
    token_first = tokens.ndim == 3 and len(tokens) != batch == tokens.shape[1]

    def own(value: Tensor, last: int = 1) -> Tensor:  # (B, N, ...), by how many axes are behind
        value, behind = value.detach().cpu(), value.shape[value.ndim - last :]
        shaped = value.reshape(-1, batch, *behind) if token_first else None
        return value.reshape(batch, -1, *behind) if shaped is None else shaped.transpose(0, 1)

    return replace(
        seen,
        inputs=own(tokens).float(),
        experts={name: own(experts) for name, experts in seen.experts.items()},
        weights={name: own(weights).float() for name, weights in seen.weights.items()},
        codes={name: own(codes, 0) for name, codes in seen.codes.items()},
        dispatch=None if seen.dispatch is None else own(seen.dispatch, 2).float(),
        combine=None if seen.combine is None else own(seen.combine, 2).float(),
        placed=tokens.ndim == 2 or token_first or len(tokens) == batch,  # not in windows
    )
