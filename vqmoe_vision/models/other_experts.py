"""Checkpoints with experts that are not those of the model: in what, and what would fit."""

from __future__ import annotations

import re

from .state_dicts import StateDict, shorten

# Options of experts that decide whether there is such a tensor, where both have a codebook: with
# it, and without.
_OPTIONS = (
    (r'\.quantizer\.norm\.', 'input_norm=True', 'input_norm=False'),
    (r'\.output_norm\.', 'output_norm=True', 'output_norm=False'),
    (
        r'\.quantizer\.codebook\.',
        'the codebook of the checkpoint',
        'the codebook of the checkpoint',
    ),
)
_SEPARATE = re.compile(r'\.experts\.fc[12]\.\d+\.')


def layer_of(name: str) -> str:
    """'blocks.1.mlp' of 'blocks.1.mlp.router.weight', and nothing of what is not in an MLP.

    Args:
        name: Of a tensor.
    """
    layer, found, _ = name.partition('.mlp.')
    return f'{layer}.mlp' if found else ''


def block_of(name: str) -> str:
    """'blocks.1.' of 'blocks.1.mlp.fc1.weight', and nothing of what is in no block.

    Args:
        name: Of a tensor.
    """
    match = re.match(r'blocks\.\d+\.', name)
    return match[0] if match else ''


def refuse_other_experts(
    expected: StateDict, filtered: StateDict, fitted: StateDict, path: str, options: str = ''
) -> None:
    """Refuse experts where the model has others.

    Weights of a dense model may start one with experts, but those of one method mean nothing to
    another.

    Args:
        expected: Of the model.
        filtered: Of the checkpoint, in the sizes of the model as far as timm can do that.
        fitted: The same after each MoE layer has fitted its part.
        path: What the checkpoint is called, for messages.
        options: As in `Model`.

    Raises:
        ValueError: There are some; names what they are.
    """
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
        or _one_branch(missing, unexpected, filtered)
        or _other_options(missing, unexpected, expected, filtered, options, parts)
        or _other_method(expected, filtered, parts)
    )
    raise ValueError(f'checkpoint {path!r} {what}')


def kept_by_another(expected: StateDict, state: StateDict, upcycles: bool) -> str:
    """What would take weights that are no model's of these experts, for the end of a line.

    Args:
        expected: Of the model.
        state: Of a dense model, or of another form of the experts; of others nothing is known.
        upcycles: Whether `upcycle` is an argument of the model, and not one of timm's own that has
            got experts.
    """
    if _routed(expected) and not _routed(state) and any('.mlp.fc1.' in name for name in state):
        overlay = 'pretrained=True with pretrained_cfg_overlay=dict(file=FILE)'
        ways = 'upcycle=FILE' if upcycles else f'{overlay}, or convert_to_moe of the dense model,'
        return f'; they are of a dense model: {ways} makes experts of its MLPs'
    return discrete_alone(expected, state)


def discrete_alone(expected: StateDict, state: StateDict) -> str:
    """What would take weights of the model without its router, for the end of a line.

    Args:
        expected: Of the model.
        state: Of a checkpoint; empty is the answer to any other.
    """
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    branch = _one_branch(missing, unexpected, state) if missing else ''
    return f'; it {branch}' if branch else ''


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


def _one_branch(missing: list[str], unexpected: list[str], filtered: StateDict) -> str:
    """Codes without what routes beside them: VQMoE's discrete form."""
    routes = all(re.search(r'\.mlp\.(router|gate)\.', name) for name in missing)
    if unexpected or not routes or not any('.mlp.quantizer.' in name for name in filtered):
        return ''
    return "has the discrete branch alone: form='discrete' would fit"


def _other_options(
    missing: list[str],
    unexpected: list[str],
    expected: StateDict,
    filtered: StateDict,
    known: str,
    parts: str,
) -> str:
    """The same method with other options, as the source or codebooks in both say."""
    torn = any('.mlp.experts.' in name for name in (*missing, *unexpected))
    hints = [known] if known and not torn else []
    if not hints and _has(expected, '.mlp.quantizer.') and _has(filtered, '.mlp.quantizer.'):
        for pattern, present, absent in _OPTIONS:
            if any(re.search(pattern, name) for name in unexpected):
                hints.append(present)
            elif any(re.search(pattern, name) for name in missing):
                hints.append(absent)
    if not hints:
        return ''
    return f'has experts with other options: {parts}; {", ".join(hints)} would fit'


def _other_method(expected: StateDict, filtered: StateDict, parts: str) -> str:
    """Of VQMoE names do not tell a router that stands alone from that of another method."""
    if not _routed(expected):
        return f'has experts and the model has none: {parts}; a model with such experts would fit'
    ours, theirs = _form(expected), _form(filtered)
    if '' in (ours, theirs) or ours == theirs:
        return f'is of another MoE method: {parts}'
    fits = f'form={theirs!r} would fit if both are of VQMoE'
    return f'is of another MoE method, or of another form of VQMoE: {parts}; {fits}'


def _form(state: StateDict) -> str:
    """The form of VQMoE that has such names; empty if none has."""
    codes, routes = (_has(state, f'.mlp.{part}.') for part in ('quantizer', 'router'))
    if codes:
        return 'full' if routes else 'discrete'
    return 'continuous' if _has(state, '.mlp.router.weight') else ''


def _has(state: StateDict, part: str) -> bool:
    return any(part in name for name in state)


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
