"""Checkpoints with experts that are not those of the model: in what, and what would fit."""

from __future__ import annotations

import re

from torch import nn

from .options_that_fit import experts_that_fit
from .state_dicts import StateDict, layer_of, shorten

_SEPARATE = re.compile(r'\.experts\.fc[12]\.\d+\.')


def refuse_other_experts(
    expected: StateDict,
    filtered: StateDict,
    fitted: StateDict,
    path: str,
    model: nn.Module,
    options: str = '',
) -> None:
    """Refuse experts where the model has others."""
    routed = _routed(filtered) & {layer_of(name) for name in expected}
    missing = [k for k in expected if layer_of(k) in routed and k not in fitted]
    unexpected = [k for k in filtered if layer_of(k) in routed and k not in expected]
    if not missing and not any(k in fitted for k in unexpected):
        return
    owners = {'only it has': unexpected, 'only the model has': missing}
    parts = '; '.join(f'{owner} {shorten(names)}' for owner, names in owners.items() if names)
    what = (
        _elsewhere(expected, filtered)
        or _held_otherwise(expected, filtered)
        or _stated_options(missing, unexpected, options, parts)
        or _other_method(model, expected, filtered, parts)
    )
    raise ValueError(f'checkpoint {path!r} {what}')


def kept_by_another(model: nn.Module, state: StateDict, upcycles: bool) -> str:
    """What would take weights that are no model's of these experts, for the end of a line."""
    routed = _routed(model.state_dict())
    if routed and not _routed(state) and any('.mlp.fc1.' in name for name in state):
        overlay = 'pretrained=True with pretrained_cfg_overlay=dict(file=FILE)'
        ways = 'upcycle=FILE' if upcycles else f'{overlay}, or convert_to_moe of the dense model,'
        return f'; they are of a dense model: {ways} makes experts of its MLPs'
    return str(experts_that_fit(model, state))


def _elsewhere(expected: StateDict, filtered: StateDict) -> str:
    """Layers of the same method that stand in blocks where the model has plain MLPs."""
    theirs, ours = _routed(filtered), _routed(expected)
    if not ours or theirs <= ours:
        return ''
    found = {name: value.shape for name, value in _part(filtered, min(theirs))}
    own = {name: value.shape for name, value in _part(expected, min(ours))}
    if found.keys() != own.keys():
        return ''
    here, there = (', '.join(map(str, _blocks(layers))) for layers in (theirs, ours))
    fits = f'; moe_layers={_blocks(theirs)} would fit' if found == own else ''
    return f'has its experts in blocks {here}, the model in blocks {there}{fits}'


def _stated_options(missing: list[str], unexpected: list[str], known: str, parts: str) -> str:
    """The same method with other options, as the source says."""
    torn = any('.mlp.experts.' in name for name in (*missing, *unexpected))
    if not known or torn:
        return ''
    return f'has experts with other options: {parts}; {known} would fit'


def _other_method(model: nn.Module, expected: StateDict, filtered: StateDict, parts: str) -> str:
    """Names and shapes tell the method, and some methods have the same ones."""
    if not _routed(expected):
        return f'has experts and the model has none: {parts}; a model with such experts would fit'
    fits = experts_that_fit(model, filtered)
    what = 'is of another MoE method'
    if fits.options:
        what = f'{what}, or has other options' if fits.methods else 'has experts with other options'
    return f'{what}: {parts}{fits}'


def _held_otherwise(expected: StateDict, filtered: StateDict) -> str:
    """Experts that are stacked in one of both, and linear layers in the other."""
    alone, own = (any(map(_SEPARATE.search, state)) for state in (filtered, expected))
    layers = _routed(filtered), _routed(expected)
    rest, others = (
        {k for layer in found for k, _ in _part(state, layer) if not k.startswith('experts.')}
        for state, found in zip((filtered, expected), layers, strict=True)
    )
    if alone == own or rest != others:
        return ''
    if alone:
        return (
            'holds each expert in linear layers of its own, as experts_as_linear leaves them: '
            'call experts_as_linear(model) before its weights are loaded'
        )
    return 'holds experts stacked: load its weights before experts_as_linear(model)'


def _routed(state: StateDict) -> set[str]:
    return {layer_of(name) for name in state if '.mlp.experts.' in name}


def _blocks(layers: set[str]) -> list[int]:
    return sorted(int(layer.split('.')[1]) for layer in layers)


def _part(state: StateDict, layer: str) -> list:
    """Tensors of a layer, by their names in it."""
    return [(k[len(layer) + 1 :], v) for k, v in state.items() if layer_of(k) == layer]
