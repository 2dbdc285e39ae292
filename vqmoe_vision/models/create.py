"""`timm.create_model` as tasks call it, and the options of a row."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import timm
import torch
from timm.layers import Mlp
from timm.models import get_arch_name
from torch import nn

from ..moe.config import check, did_you_mean
from ..moe.methods import METHODS
from .layers import (
    MLPS,
    MODULES,
    MOE_HOST,
    Transformer,
    check_method,
    method_of,
    moe_options,
    scale_fresh_experts,
)
from .moe_vit import SparseModel, check_patches, check_vit_arguments
from .normalization import check_normalization
from .upcycle import read_upcycling, refuse_unused
from .vit_moe import DENSE, Source
from .weights import (
    GIVEN,
    Described,
    check_one_source,
    find_source,
    load_weights,
    overlay_for,
    read_fitting,
    weights_in,
)

# Options with which timm changes weights that are whole, or takes a part of them.
_ADAPTED = (
    *('in_chans', 'num_classes', 'pretrained_cfg_overlay'),
    *('features_only', 'out_indices', 'feature_cls'),
)
# Fields of a model that give it weights to start from, of which experts may be made.
STARTS = ('checkpoint', 'checkpoint_path', 'pretrained', 'upcycle')


def create_model(
    model_name: str, moe: dict | None = None, extra_mlps: int = 0, **kwargs: Any
) -> nn.Module:
    """`timm.create_model` for a config: experts for any host, and weights that fit or are refused.

    `moe` has the options of experts, with their `method` for a model of timm. `extra_mlps` widens
    a dense model by as many MLPs, spread over its blocks.
    """
    if not timm.is_model(model_name):
        hint = did_you_mean(model_name, timm.list_models()) or '; timm.list_models() lists them'
        raise ValueError(f'model_name={model_name!r} is not a timm model{hint}')
    kwargs = {n: v for n, v in _with_classes(kwargs).items() if v is not None}  # as timm does
    check(moe is None or isinstance(moe, dict), 'moe', moe, 'a dictionary of options, or None')
    check_one_source(kwargs)
    if isinstance(stated := kwargs.get('pretrained_cfg'), dict):
        check_normalization(stated, 'pretrained_cfg.')
    if path := kwargs.get('checkpoint_path'):
        kwargs['checkpoint_path'] = weights_in(str(path))  # timm reads no folders here
    method = method_of(model_name)
    dense = method is None
    check(get_arch_name(model_name) != MOE_HOST, 'model_name', model_name, 'that of the host')
    given = dict(moe or {})
    if given or (dense and moe is not None):
        own: Any = given.get('method', method)
        check_method(own, 'moe.method')
        check(method in (None, own), 'moe.method', own, f'{method}, as the name of the model says')
        options = {'method', *moe_options(own)}
        for name, value in given.items():
            allowed = f'the options are {", ".join(sorted(options))}{did_you_mean(name, options)}'
            check(name in options, f'moe.{name}', value, allowed)
            allowed = f'moe.{name}={value!r} is set, change it'
            check(name not in kwargs, name, kwargs.get(name), allowed)
        given.pop('method', None)
    if dense and timm.models.is_model_in_modules(model_name, ('vision_transformer', 'vit_moe')):
        check_vit_arguments(kwargs)
    if dense and moe is not None:
        check(not extra_mlps, 'extra_mlps', extra_mlps, '0, moe gives the model experts')
        kwargs = {'host': model_name, 'method': own, **given, **_from_pretrained(kwargs)}
        model = timm.create_model(MOE_HOST, **kwargs)
    else:
        kwargs |= given
        if extra_mlps:
            kwargs['mlp_ratio'] = _wider(model_name, extra_mlps, kwargs)
        model = _create(model_name, kwargs)
    published = timm.get_pretrained_cfg(model_name)
    check_patches(model, kwargs, published.input_size if published else ())
    return model


def _with_classes(kwargs: dict) -> dict:
    """A config names the class of `mlp_layer`."""
    if isinstance(named := kwargs.get('mlp_layer'), str) and named in MLPS:
        return {**kwargs, 'mlp_layer': MLPS[named]}
    return kwargs


def _create(model_name: str, kwargs: dict) -> nn.Module:
    """A model by its own entry point; a dense vision transformer is never half loaded."""
    fitted = timm.models.is_model_in_modules(model_name, MODULES) and method_of(model_name) is None
    if fitted and kwargs.get('pretrained') and not kwargs.get('features_only'):
        check(kwargs['pretrained'] is True, 'pretrained', kwargs['pretrained'], 'True or False')
        source, cache_dir = Source(model_name, kwargs), kwargs.get('cache_dir')
        overlay, described = overlay_for(None, source.config, source.overlay, source.own, cache_dir)
        kwargs = {**kwargs, 'pretrained': False, 'pretrained_cfg_overlay': overlay}
        model = timm.create_model(model_name, **kwargs)
        load_weights(model, described, cache_dir, source.follow)
        return model
    # timm would compare no checksums, and say nothing of a file that is not there
    model = timm.create_model(model_name, **{**kwargs, 'checkpoint_path': ''})
    if checkpoint_path := kwargs.get('checkpoint_path'):
        model.load_state_dict(read_fitting(model, checkpoint_path))
    return model


def _from_pretrained(kwargs: dict) -> dict:
    """A checkpoint of the host as weights that are fitted; timm would want it to have experts."""
    others = dict(kwargs)
    if path := others.pop('checkpoint_path', None):
        overlay = {**(kwargs.get('pretrained_cfg_overlay') or {}), 'file': path}
        others |= {'pretrained': True, 'pretrained_cfg_overlay': overlay}
    return others


def _wider(model_name: str, extra_mlps: int, kwargs: dict) -> float:
    """The `mlp_ratio` that spreads `extra_mlps` over all blocks."""
    check(isinstance(extra_mlps, int) and extra_mlps > 0, 'extra_mlps', extra_mlps, 'at least 0')
    with torch.device('meta'):  # for depth and ratio only
        plain = {**kwargs, 'pretrained': False, 'checkpoint_path': ''}
        model: Any = timm.create_model(model_name, **plain)
    blocks: Any = model.blocks if isinstance(model, Transformer) else []
    mlps = [block.mlp for block in blocks if isinstance(getattr(block, 'mlp', None), Mlp)]
    dense = len(mlps) == len(blocks) > 0
    check(dense, 'extra_mlps', extra_mlps, f'0, {model_name} has no plain MLPs')
    ratio = mlps[0].fc1.out_features / mlps[0].fc1.in_features
    return ratio * (len(mlps) + extra_mlps) / len(mlps)


def create_saved(source: str, **kwargs: Any) -> nn.Module:
    """A model that timm has saved as a folder or on the hub, with its weights."""
    place, described = find_source(source, kwargs.get('cache_dir'), 'source')
    name, arguments = described.name, {**described.arguments, **kwargs}
    if not timm.models.is_model_in_modules(name, MODULES) or method_of(name) is not None:
        if place.get('file') and name != MOE_HOST and method_of(name) is None:
            own = {k: v for k, v in kwargs.items() if k not in _ADAPTED}
            with torch.device('meta'):
                whole = timm.create_model(name, **{**described.arguments, **own})
            read_fitting(whole, weights_in(place['file']))  # timm would load what fits
        # of a model with experts what was saved is not what the call says, see `build`
        return timm.create_model(source, pretrained=True, **kwargs)
    config = {**described.config, **place}
    return create_model(name, pretrained=True, pretrained_cfg=config, **arguments)


def create_to_start(
    model_name: str, moe: dict | None = None, extra_mlps: int = 0, **kwargs: Any
) -> Any:
    """As `create_model`, of a model whose weights may come later."""
    allowed = '3, as data sets of configs give RGB images, also of gray ones'
    check(kwargs.get('in_chans', 3) == 3, 'in_chans', kwargs.get('in_chans'), allowed)
    own = method_of(model_name) is not None
    # a model of ours takes the weights of `checkpoint_path` as they are
    loads = ('pretrained', 'upcycle') if own else ('pretrained', 'checkpoint_path')
    if not (own or moe) or any(kwargs.get(name) for name in loads):
        return create_model(model_name, moe, extra_mlps, **kwargs)
    how = read_upcycling(kwargs.pop('upcycling', None))
    model: Any = create_model(model_name, moe, extra_mlps, **kwargs)
    model.upcycling = how
    return model


def check_upcycled(model: nn.Module) -> None:
    """Refuses a model that says how its experts are made of dense weights, and was given none."""
    if isinstance(model, SparseModel) and model.weights_report is None:
        refuse_unused(read_upcycling(model.upcycling), 'checkpoint=FILE or pretrained=True')


def without_weights(arguments: dict) -> dict:
    """Arguments of a model all of whose weights come later: those that these name are not read."""
    result = {name: GIVEN.get(name, value) for name, value in arguments.items()}
    named = arguments
    if method_of(arguments['model_name']) is None and arguments.get('moe'):
        named = _from_pretrained(arguments)
    if not (named.get('pretrained') or named.get('upcycle')):
        return result
    config, overlay = (named.get(n) or {} for n in ('pretrained_cfg', 'pretrained_cfg_overlay'))
    config = config if isinstance(config, dict) else {}
    try:
        _, described = overlay_for(named.get('upcycle'), config, overlay, Described())
    except ValueError:  # it is gone, and weights of another network would be refused
        return result
    known = described.config.keys() - {'mean', 'std', *config}
    found = {**{name: described.config[name] for name in known}, **overlay}
    return {**result, **({'pretrained_cfg_overlay': found} if found else {})}


def options_in_full(model: Mapping) -> dict:
    """What the MoE layers of a config's model would be built with today."""
    moe, name = model.get('moe') or {}, model.get('model_name')
    own = method_of(name) if isinstance(name, str) else None
    # a model of this package takes the options of its method beside its own too
    given = {**model, **moe} if own is not None else moe
    method = own if own is not None else moe.get('method')
    if method not in METHODS:
        return {}
    known = METHODS[method].config.option_names()
    options: dict = {n: v for n, v in given.items() if n in known}
    with suppress(ValueError):  # a finished comparison may name what is possible no more
        options = METHODS[method].config.from_options(**options).effective_options()
    if any(model.get(start) for start in STARTS):
        options['upcycling'] = asdict(read_upcycling(model.get('upcycling')))
    return {'method': method, **options}


def share_start(model: Any, model_name: str, seed: int, **kwargs: Any) -> None:
    """Set a freshly built model to the start that all rows of its shape have at a seed."""
    if any(kwargs.get(name) for name in ('pretrained', 'checkpoint_path', 'upcycle')):
        return
    sparse = isinstance(model, SparseModel)
    if sparse:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            seeds = torch.randint(2**62, (len(model.blocks), 2)).tolist()
            for block, pair in zip(model.blocks, seeds, strict=True):
                if hasattr(block.mlp, 'experts'):
                    experts = block.mlp.experts
                    parts = experts.first_layers(), [experts.fc2]
                    for layers, own in zip(parts, pair, strict=True):
                        torch.manual_seed(own)
                        for layer in layers:
                            layer.init_weights()
        scale_fresh_experts(model)
        options = moe_options(model.method) | {'upcycling'}
        kwargs = {name: value for name, value in kwargs.items() if name not in options}
        if method_of(model_name) is not None:
            stem = model_name.partition('.')[0].rpartition('_')[0]
            model_name = DENSE if stem == 'test_vit' else f'{stem}_patch16_224'
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = timm.create_model(model_name, **_with_classes(kwargs))
    state = model.state_dict()
    theirs = dense.state_dict().items()
    shared = {k: v for k, v in theirs if k in state and state[k].shape == v.shape}
    model.load_state_dict(shared, strict=False)
