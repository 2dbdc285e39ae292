"""Checkpoints whose tensors have other shapes than the model's: which sizes would fit."""

from __future__ import annotations

import math
from dataclasses import replace

from .hosts import Transformer
from .networks_that_fit import Model, network_that_fits
from .options_that_fit import experts_that_fit
from .state_dicts import CLASSIFIERS, HEADS, StateDict, is_square
from .would_fit import in_words


def sizes_that_fit(expected: StateDict, fitted: StateDict, model: Model) -> str:
    """Arguments by which a model would have the sizes of a checkpoint, for the end of a line."""
    pairs = {name: (fitted[name].shape, v.shape) for name, v in expected.items() if name in fitted}
    free = (*HEADS, 'pos_embed')  # positions are resized
    other = {k for k, (theirs, ours) in pairs.items() if theirs != ours and not k.startswith(free)}
    if any(len(theirs) != len(ours) for theirs, ours in pairs.values()):
        return ''
    routed = '.mlp.experts.'
    layers = {name.partition(routed)[0] for name in fitted if routed in name}
    of_experts = {name for name in other if name.partition('.mlp.')[0] in layers}
    network = network_that_fits(model, fitted)
    if not of_experts or network.lacking:
        return str(network)
    # experts of the network that fits
    width, ratio = (network.options.get(name) for name in ('embed_dim', 'mlp_ratio'))
    found = experts_that_fit(model.network, fitted, width, ratio)
    if not network.options:
        # the names are those of the method, which other methods may share
        found = replace(found, methods='') if found.options else found
        return str(found) if of_experts == other else ''
    words = ', '.join(part for part in (in_words(network.options), found.options) if part)
    return f'; {words}{network.heads} would fit' if found.fits else ''


def whole_that_fits(network: Transformer, state: StateDict, start: str) -> str:
    """What would take weights that do not fit as a whole, for the end of a line."""
    expected = network.state_dict()
    ours, theirs = (any('.mlp.experts.' in name for name in x) for x in (expected, state))
    if ours and not theirs and any('.mlp.fc1.' in name for name in state):
        return f'; it is of a dense model: {start}=FILE makes experts of its MLPs for a training'
    found = sizes_that_fit(expected, state, Model.of(network)) or str(
        experts_that_fit(network, state)
    )
    pairs = [(k, tuple(v.shape), tuple(state[k].shape)) for k, v in expected.items() if k in state]
    other = {name for name, ours, theirs in pairs if ours != theirs}
    options, resized = [], ''
    head = 'head.weight'
    if head in other and state[head].shape[0] != expected[head].shape[0]:
        options.append(f'num_classes={state[head].shape[0]}')
    if 'pos_embed' in other and state['pos_embed'].shape[1] != expected['pos_embed'].shape[1]:
        resized = f'; positions are resized for a training that starts by {start}=FILE'
        side = _side(network, state)
        options += [f'img_size={side}'] if side else []
    words = ', '.join(options)
    if found:
        return f'{found}{f", with {words}" if words else ""}{resized}'
    alone = expected.keys() == state.keys() and all(
        name == 'pos_embed' or name.startswith(CLASSIFIERS) for name in other
    )
    return f'; {words} would fit{resized}' if words and alone else resized


def _side(network: Transformer, state: StateDict) -> int:
    """Of square images, to whose grid positions belong; 0 if that is not known."""
    tokens = 0 if network.no_embed_class else network.num_prefix_tokens
    count, patch = state['pos_embed'].shape[1] - tokens, network.patch_embed.patch_size
    return math.isqrt(count) * patch[0] if is_square(count) and patch[0] == patch[1] else 0
