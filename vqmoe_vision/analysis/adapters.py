"""What the layers of experts of any model decide; no library is imported for that.

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

# Of a module, its arguments by place and by name, and its answer, a record whose tensors lie as
# they came: those of tokens (B, N, D), (T, D) or (N, B, D).
Adapter = Callable[[Any, tuple, dict, Any], LayerRecord]


def called_experts(module: Any, args: tuple, kwargs: dict, answer: Any) -> LayerRecord:
    """Experts of transformers, which are called with the indices of those that are chosen."""
    given = inspect.signature(module.forward).bind(*args, **kwargs)
    tokens, experts, weights = given.args[:3]
    weights, order = weights.sort(dim=-1, descending=True, stable=True)
    return _of_router(tokens, module.num_experts, experts.gather(-1, order), weights)


def dispatching_gate(module: Any, args: tuple, kwargs: dict, answer: Any) -> LayerRecord:
    """The gate of st-moe-pytorch, which answers with dispatch and combine tensors (B, N, E, C)."""
    shares = answer[1].sum(dim=-1)
    weights, experts = shares.topk(module.top_n)
    experts = experts.masked_fill(weights == 0, -1)
    return _of_router(args[0], shares.shape[-1], experts, weights)


def soft_slots(module: Any, args: tuple, kwargs: dict, answer: Any) -> LayerRecord:
    """The layer of soft-moe-pytorch, whose weights are computed again from its tokens."""
    tokens = args[0].flatten(2).mT if args[0].ndim == 4 else args[0]
    slots = module.slot_norm(module.slot_embeds)
    logits = torch.einsum('bnd,esd->bnes', module.norm(tokens), slots)
    combine = logits.flatten(2).softmax(dim=-1).view_as(logits)
    return LayerRecord(len(slots), tokens, None, dispatch=logits.softmax(dim=1), combine=combine)


def quantizer(module: Any, args: tuple, kwargs: dict, answer: Any) -> LayerRecord:
    """A codebook of vector-quantize-pytorch with an index per token."""
    codes, number = {'codebook': answer[1]}, int(module.codebook_size)
    return LayerRecord(0, args[0], None, codes=codes, num_codes=number)


def scores(top_k: int, module: Any, args: tuple, kwargs: dict, answer: Any) -> LayerRecord:
    """A router that answers with a score per expert, (..., E)."""
    check(isinstance(answer, Tensor), 'router', type(answer).__name__, 'a score per expert')
    check(top_k <= answer.shape[-1], 'top_k', top_k, f'up to {answer.shape[-1]} experts')
    weights, experts = answer.float().softmax(dim=-1).topk(top_k)
    return _of_router(args[0], answer.shape[-1], experts, weights)


_LAYERS = (soft_slots, quantizer)  # of these the module is the layer, of others its parent


def _of_router(tokens: Tensor, number: int, experts: Tensor, weights: Tensor) -> LayerRecord:
    return LayerRecord(number, tokens, None, {'router': experts}, {'router': weights})


def adapter_of(module: Any) -> Adapter | None:
    """What reads a module of a library that is known."""
    package, name = type(module).__module__.split('.')[0], type(module).__name__
    if package == 'vector_quantize_pytorch' and hasattr(module, 'codebook_size'):
        return quantizer
    kinds = {'st_moe_pytorch.TopNGating': dispatching_gate, 'soft_moe_pytorch.SoftMoE': soft_slots}
    if isinstance(module, torch.jit.ScriptModule):  # without a signature
        return None
    calls = 'top_k_index' in inspect.signature(module.forward).parameters
    return called_experts if calls else kinds.get(f'{package}.{name}')


def _readers(model: nn.Module, router: str, top_k: int) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """Layer, module and adapter of all layers that are not this package's."""
    modules = dict(model.named_modules())
    known = {n: adapter for n, module in modules.items() if (adapter := adapter_of(module))}
    named = [n for n in modules if n and fnmatchcase(f'.{n}', router) | fnmatchcase(n, router)]
    by_name: dict[str, Adapter] = dict.fromkeys(named, partial(scores, top_k))
    # what is inside of these is theirs
    ours = (n for n, module in modules.items() if isinstance(module, MoeLayer))
    whole = tuple(f'{n}.' for n in (*ours, *(n for n in known if known[n] in _LAYERS)))
    seen: set[str] = set()  # what is known comes before what has a name
    for name, adapter in (*known.items(), *by_name.items()):
        layer = name if adapter in _LAYERS else name.rpartition('.')[0]
        layer = layer or type(model).__name__
        if layer not in seen and not name.startswith(whole):
            yield layer, modules[name], adapter
            seen.add(layer)


def decisions(
    model: nn.Module, images: Tensor, router: str = '*.gate', top_k: int = 2
) -> dict[str, LayerRecord]:
    """Runs a model in eval mode: what its layers decided by their name; it is left as it was."""
    records: dict[str, LayerRecord] = {}

    def keep(layer: str, adapter: Adapter, *seen: Any) -> None:
        records[layer] = _by_image(layer, adapter(*seen), len(images))

    with ExitStack() as stack:
        if moe_layers(model):
            records = stack.enter_context(record_layers(model))
        for layer, module, adapter in _readers(model, router, top_k):
            hook = partial(keep, layer, adapter)
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
        value = value.float() if value.is_floating_point() else value
        if token_first:
            return value.reshape(-1, batch, *behind).transpose(0, 1)
        return value.reshape(batch, -1, *behind)

    return replace(
        seen,
        inputs=own(tokens),
        experts={name: own(experts) for name, experts in seen.experts.items()},
        weights={name: own(weights) for name, weights in seen.weights.items()},
        codes={name: own(codes, 0) for name, codes in seen.codes.items()},
        dispatch=None if seen.dispatch is None else own(seen.dispatch, 2),
        combine=None if seen.combine is None else own(seen.combine, 2),
        placed=tokens.ndim == 2 or token_first or len(tokens) == batch,  # not in windows
    )
