"""What the layers of experts of any model decide: an adapter is a function from a module to it.

This package's layers are recorded by their own recorder. Others are watched at what chooses or at
what is chosen; no library is imported for that.

Legend: B images or texts, N tokens of each, T tokens of all, D width, E experts, K experts per
token, P slots per expert.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqmoe_vision.moe import MoeLayer, moe_layers
from vqmoe_vision.moe.config import check

from .record import LayerRecord, evaluating, record_layers


class Decided(NamedTuple):
    """What a module decided, in the order of the tokens that it was given."""

    tokens: Tensor  # (B, N, D), (T, D), or (N, B, D)
    number: int  # of experts, or of codes
    experts: Tensor | None = None  # (..., K), -1 for none
    weights: Tensor | None = None  # (..., K)
    codes: Tensor | None = None  # (...)
    slots: tuple[Tensor, Tensor] | None = None  # dispatch and combine weights, (B, N, E, P)


Reads = Callable[[tuple, dict, Any], Decided]  # positional and named arguments, and the answer


def called_experts(module: nn.Module) -> Reads | None:
    """Experts of transformers, which are called with the indices of those that are chosen."""
    arguments = inspect.signature(module.forward)
    if 'top_k_index' not in arguments.parameters:
        return None

    def read(args: tuple, kwargs: dict, answer: Any) -> Decided:
        tokens, experts, weights = arguments.bind(*args, **kwargs).args[:3]
        return Decided(tokens, int(module.num_experts), experts, weights)

    return read


def dispatching_gate(module: nn.Module) -> Reads | None:
    """The gate of st-moe-pytorch, which answers with dispatch and combine tensors (B, N, E, C)."""
    if not _is(module, 'st_moe_pytorch', 'TopNGating'):
        return None

    def read(args: tuple, kwargs: dict, answer: Any) -> Decided:
        weights = answer[1].sum(dim=-1)
        chosen = weights.topk(int(module.top_n))
        experts = chosen.indices.masked_fill(chosen.values == 0, -1)
        return Decided(args[0], weights.shape[-1], experts, chosen.values)

    return read


def soft_slots(module: nn.Module) -> Reads | None:
    """The layer of soft-moe-pytorch, whose weights are computed again from its tokens."""
    if not _is(module, 'soft_moe_pytorch', 'SoftMoE'):
        return None

    def read(args: tuple, kwargs: dict, answer: Any) -> Decided:
        own: Any = module
        tokens = args[0].flatten(2).mT if args[0].ndim == 4 else args[0]
        logits = torch.einsum('bnd,esd->bnes', own.norm(tokens), own.slot_norm(own.slot_embeds))
        combine = logits.flatten(2).softmax(dim=-1).view_as(logits)
        return Decided(tokens, logits.shape[2], slots=(logits.softmax(dim=1), combine))

    return read


def quantizer(module: nn.Module) -> Reads | None:
    """A codebook of vector-quantize-pytorch with an index per token."""
    size = getattr(module, 'codebook_size', None)
    if not _is(module, 'vector_quantize_pytorch', type(module).__name__) or size is None:
        return None
    return lambda args, kwargs, answer: Decided(args[0], int(size), codes=answer[1])


def scores(module: nn.Module, top_k: int) -> Reads:
    """A router that answers with a score per expert, (..., E), or a map of them."""

    def read(args: tuple, kwargs: dict, answer: Any) -> Decided:
        check(isinstance(answer, Tensor), 'router', type(answer).__name__, 'a score per expert')
        is_map = isinstance(module, nn.Conv2d)
        tokens, logits = (x.movedim(1, -1) if is_map else x for x in (args[0], answer))
        check(top_k <= logits.shape[-1], 'top_k', top_k, f'up to {logits.shape[-1]} experts')
        chosen = logits.float().softmax(dim=-1).topk(top_k)
        return Decided(tokens, logits.shape[-1], chosen.indices, chosen.values)

    return read


ADAPTERS = (called_experts, dispatching_gate, soft_slots, quantizer)
_LAYERS = (soft_slots, quantizer)  # of these the module is the layer, of others its parent


def _is(module: nn.Module, package: str, name: str) -> bool:
    kind = type(module)
    return kind.__module__.split('.')[0] == package and kind.__name__ == name


def readers(
    model: nn.Module, router: str, top_k: int
) -> Iterator[tuple[str, str, nn.Module, Reads]]:
    """Layer, decider, module and what reads it, of all layers that are not this package's."""
    # what is inside of these is theirs
    whole = tuple(f'{n}.' for n, m in model.named_modules() if isinstance(m, MoeLayer))
    seen: set[str] = set()
    for adapter in (*ADAPTERS, None):
        for name, module in model.named_modules():
            layer, _, decider = name.rpartition('.')
            if adapter is None:
                by_name = fnmatchcase(f'.{name}', router) or fnmatchcase(name, router)
                read = scores(module, top_k) if by_name and name else None
            else:
                read = adapter(module)
            if adapter in _LAYERS:
                layer, decider = name, 'codebook'
            layer = layer or type(model).__name__
            if read is None or layer in seen or f'{name}.'.startswith(whole):
                continue
            yield layer, decider, module, read
            seen.add(layer)
            if adapter in _LAYERS:
                whole = (*whole, f'{name}.' if name else '')


def decisions(
    model: nn.Module, images: Tensor, router: str = '*.gate', top_k: int = 2
) -> dict[str, LayerRecord]:
    """Runs a model in eval mode: what its layers decided by their name; it is left as it was."""
    records: dict[str, LayerRecord] = {}

    def keep(layer: str, decider: str, read: Reads, _: Any, args: Any, kwargs: Any, y: Any) -> None:
        records[layer] = _record(layer, decider, read(args, kwargs, y), len(images))

    with ExitStack() as stack:
        if moe_layers(model):
            records = stack.enter_context(record_layers(model))
        for layer, decider, module, read in readers(model, router, top_k):
            hook = partial(keep, layer, decider, read)
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        stack.enter_context(evaluating(model))
        model(images.to(next(model.parameters(), images).device))
    allowed = f'one with layers of experts, this is dense, and no {router} is in it'
    check(bool(records), 'model', type(model).__name__, allowed)
    return records


def _record(layer: str, decider: str, found: Decided, batch: int) -> LayerRecord:
    tokens = found.tokens
    count = tokens[..., 0].numel()
    check(count % batch == 0, f'{layer}: tokens', count, f'a multiple of {batch} images')
    token_first = tokens.ndim == 3 and len(tokens) != batch == tokens.shape[1]

    def by_image(value: Tensor, *last: int) -> Tensor:
        value = value.detach().cpu()
        if token_first:
            return value.reshape(-1, batch, *last).transpose(0, 1)
        return value.reshape(batch, -1, *last)

    inputs = by_image(tokens, tokens.shape[-1]).float()
    placed = tokens.ndim == 2 or token_first or len(tokens) == batch  # not in windows
    if found.slots is not None:
        dispatch, combine = (by_image(s, *s.shape[2:]).float() for s in found.slots)
        return LayerRecord(found.number, inputs, None, dispatch=dispatch, combine=combine)
    if found.codes is not None:
        codes = {decider: by_image(found.codes)}
        return LayerRecord(0, inputs, None, codes=codes, num_codes=found.number, placed=placed)
    assert found.experts is not None and found.weights is not None
    weights, order = (
        by_image(found.weights, found.weights.shape[-1])
        .float()
        .sort(dim=-1, descending=True, stable=True)
    )
    experts = by_image(found.experts, order.shape[-1]).gather(-1, order)
    return LayerRecord(
        found.number, inputs, None, {decider: experts}, {decider: weights}, placed=placed
    )
