"""Checkpoints whose tensors have other shapes than the model's: which sizes would fit."""

from __future__ import annotations

from dataclasses import replace

from .networks_that_fit import Model, network_that_fits
from .options_that_fit import experts_that_fit
from .state_dicts import StateDict
from .would_fit import in_words


def sizes_that_fit(expected: StateDict, fitted: StateDict, model: Model) -> str:
    """Arguments by which a model would have the sizes of a checkpoint, for the end of a line.

    Args:
        expected: Of the model.
        fitted: Of the checkpoint, by the names of the model.
        model: That has them.

    Returns:
        Empty if there are none that explain all that differs.
    """
    pairs = {name: (fitted[name].shape, v.shape) for name, v in expected.items() if name in fitted}
    other = {name for name, (theirs, ours) in pairs.items() if theirs != ours}
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
