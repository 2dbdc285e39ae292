"""`timm.create_model` as the tasks call it: one line for a mistake, and the options of a row."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import Mlp
from torch import nn

from ..moe.config import check, did_you_mean
from .arguments import (
    check_method,
    check_patches,
    check_vit_arguments,
    moe_options,
    named_failures,
)
from .build import known_by_name, load_whole
from .described import Described
from .hosts import MODULES, MOE_HOST, Transformer, method_of
from .normalization import check_normalization
from .saved import record_arguments
from .sources import (
    GIVEN,
    check_one_source,
    folder_source,
    said_of,
    source_of,
)
from .sparse_model import SparseModel
from .upcycle import read_upcycling, refuse_unused
from .weight_files import weights_in
from .whole_files import load_checkpoint, read_fitting

# Options with which timm changes weights that are whole, or takes a part of them.
_ADAPTED = ('in_chans', 'features_only', 'out_indices', 'feature_cls')


def create_model(
    model_name: str, moe: dict[str, Any] | None = None, extra_mlps: int = 0, **kwargs: Any
) -> nn.Module:
    """`timm.create_model`, with errors that name what was asked for."""
    if not timm.is_model(model_name):
        hint = did_you_mean(model_name, timm.list_models()) or '; timm.list_models() lists them'
        raise ValueError(f'model_name={model_name!r} is not a timm model{hint}')
    kwargs = {name: value for name, value in kwargs.items() if value is not None}  # as timm does
    allowed = 'the name of the host, and the method in moe'
    check(timm.models.get_arch_name(model_name) != MOE_HOST, 'model_name', model_name, allowed)
    # one of this package's models says itself which option is wrong
    dense = method_of(model_name) is None
    _check_moe(model_name, moe, kwargs)
    check_one_source(kwargs)
    # of a dense model without weights too, which `check_sources` does not see
    if isinstance(stated := kwargs.get('pretrained_cfg'), dict):
        check_normalization(stated, 'pretrained_cfg.')
    if path := kwargs.get('checkpoint_path'):
        kwargs['checkpoint_path'] = weights_in(str(path))  # timm reads no folders here
    sparse: dict[str, Any] = {}
    if dense and moe is not None:
        check(not extra_mlps, 'extra_mlps', extra_mlps, '0, moe gives the model experts')
        sparse = {'host': model_name, **moe, 'upcycling': kwargs.pop('upcycling', None)}
    else:
        kwargs.update(moe or {})
    build = partial(_untrained, model_name)
    if dense and timm.models.is_model_in_modules(model_name, ('vision_transformer', 'shipped')):
        check_vit_arguments(kwargs)
    with named_failures(build, kwargs, model_name) if dense else nullcontext():
        if extra_mlps:
            kwargs['mlp_ratio'] = _wider(model_name, extra_mlps, kwargs)
        if sparse:
            model = timm.create_model(MOE_HOST, **sparse, **_from_pretrained(kwargs))
        else:
            model = _create(model_name, kwargs)
    check_patches(model, kwargs)
    record_arguments(model, {**kwargs, **sparse})
    return model


def create_saved(source: str, **kwargs: Any) -> nn.Module:
    """A model that timm has saved as a folder or on the hub, with its weights."""
    place, described = folder_source(source, 'source', kwargs.get('cache_dir'))
    name, arguments = described.name, {**described.arguments, **kwargs}
    if name == MOE_HOST or method_of(name) is not None:
        # what was saved is not what the call says, see `build_sparse`
        return timm.create_model(source, pretrained=True, **kwargs)
    if place['source'] == 'local-dir' and not timm.models.is_model_in_modules(name, MODULES):
        file = weights_in(place['file'])
        _check_saved(source, file, described, kwargs)
        place = {'file': file}
    config = {**described.config, **place}
    return create_model(name, pretrained=True, pretrained_cfg=config, **arguments)


def _check_saved(source: str, file: str, described: Described, kwargs: dict[str, Any]) -> None:
    """Refuses weights of networks other than transformers of which timm would load what fits."""
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    allowed = f'entries that name no weights, {source!r} has its own'
    check(not source_of(overlay), 'pretrained_cfg_overlay', overlay, allowed)
    adapted = _ADAPTED if kwargs.get('num_classes') != 0 else (*_ADAPTED, 'num_classes')
    own = {name: value for name, value in kwargs.items() if name not in adapted}
    with torch.device('meta'):
        whole = create_model(
            described.name, pretrained_cfg=described.config, **{**described.arguments, **own}
        )
    read_fitting(whole, file, f'source={source!r}')
    config = {**described.config, **overlay}
    channels, first = config.get('input_size', (3,))[0], config.get('first_conv') or ()
    layers = [whole.get_submodule(name) for name in ([first] if isinstance(first, str) else first)]
    # timm would begin any other layer anew
    plain = [isinstance(x, nn.Conv2d) and x.weight.shape[1] == channels for x in layers]
    saved = described.arguments.get('in_chans', channels)
    asked = kwargs.get('in_chans', saved)
    fits = asked == saved or (any(plain) and all(plain))
    check(fits, 'in_chans', asked, f'{saved}, which {source!r} has')


def create_to_start(
    model_name: str, moe: dict[str, Any] | None = None, extra_mlps: int = 0, **kwargs: Any
) -> nn.Module:
    """As `create_model`, of a model whose weights may come later."""
    own = method_of(model_name) is not None
    # a model of ours takes the weights of `checkpoint_path` as they are
    loads = ('pretrained', 'upcycle') if own else ('pretrained', 'checkpoint_path')
    if not (own or moe) or any(kwargs.get(name) for name in loads):
        return create_model(model_name, moe, extra_mlps, **kwargs)
    how = read_upcycling(kwargs.pop('upcycling', None))
    model = create_model(model_name, moe, extra_mlps, **kwargs)
    sparse: Any = model
    sparse.upcycling = how
    return model


def without_weights(arguments: dict[str, Any]) -> dict[str, Any]:
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
        _, described = said_of(named.get('upcycle'), config, overlay, Described())
    except ValueError:  # it is gone, and weights of another network would be refused
        return result
    known = described.config.keys() - {'mean', 'std', *config}
    found = {**{name: described.config[name] for name in known}, **overlay}
    return {**result, **({'pretrained_cfg_overlay': found} if found else {})}


def check_upcycled(model: nn.Module) -> None:
    """Refuses a model that says how its experts are made of dense weights, and was given none."""
    if isinstance(model, SparseModel) and model.weights_report is None:
        refuse_unused(model.upcycling, 'checkpoint=FILE or pretrained=True')


def _from_pretrained(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the host as weights that are fitted; timm would want it to have experts."""
    path = kwargs.get('checkpoint_path')
    if not path:
        return kwargs
    others = {name: value for name, value in kwargs.items() if name != 'checkpoint_path'}
    given = kwargs.get('pretrained_cfg_overlay') or {}
    overlay = {**given, 'file': path, 'state_dict': None}
    return {**others, 'pretrained': True, 'pretrained_cfg_overlay': overlay}


def _create(model_name: str, kwargs: dict[str, Any]) -> nn.Module:
    """A model by its own entry point; a dense vision transformer is never half loaded."""
    fitted = timm.models.is_model_in_modules(model_name, MODULES) and method_of(model_name) is None
    if fitted and kwargs.get('pretrained'):
        overlay, filter_fn = known_by_name(model_name, kwargs)
        known = {'pretrained': False, 'pretrained_cfg_overlay': overlay}
        model = timm.create_model(model_name, **{**kwargs, **known})
        if isinstance(model, Transformer):
            load_whole(model, filter_fn, kwargs.get('cache_dir'))
            return model
    # timm would compare no checksums, and say nothing of a file that is not there
    model = timm.create_model(model_name, **{**kwargs, 'checkpoint_path': ''})
    if checkpoint_path := kwargs.get('checkpoint_path'):
        load_checkpoint(model, checkpoint_path)
    return model


def _untrained(model_name: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(model_name, **{**kwargs, 'pretrained': False, 'checkpoint_path': ''})


def _check_moe(model_name: str, moe: dict[str, Any] | None, kwargs: dict[str, Any]) -> None:
    """Refuses options that the model would not have, or that are given twice."""
    method = method_of(model_name)
    if method is None:
        allowed = f'pretrained=True or a checkpoint, {model_name} is a model of timm'
        check('upcycle' not in kwargs, 'upcycle', kwargs.get('upcycle'), allowed)
    if moe is None:
        how, dense = kwargs.get('upcycling'), method is None
        check(not dense or how is None, 'upcycling', how, f'None, {model_name} has no experts')
        return
    check(isinstance(moe, dict), 'moe', moe, 'a dictionary of options, or None')
    if method is None:
        how = f'{model_name} is dense, which takes moe=None, or the moe.method of its experts'
        check('method' in moe, 'moe', moe, how)
        method = moe['method']
        check_method(method, 'moe.method')
        moe = {name: value for name, value in moe.items() if name != 'method'}
    names = moe_options(method)
    for name, value in moe.items():
        allowed = f'the options of {model_name} are {", ".join(sorted(names))}'
        check(name in names, f'moe.{name}', value, allowed)
        check(name not in kwargs, name, kwargs.get(name), f'moe.{name}={value!r} is set, change it')


def _wider(model_name: str, extra_mlps: int, kwargs: dict[str, Any]) -> float:
    """The `mlp_ratio` that spreads `extra_mlps` over all blocks."""
    valid = isinstance(extra_mlps, int) and extra_mlps > 0
    check(valid, 'extra_mlps', extra_mlps, 'a whole number, at least 0')
    with torch.device('meta'):  # for depth and ratio only
        model: Any = _untrained(model_name, **kwargs)
    blocks: Any = model.blocks if isinstance(model, Transformer) else []
    mlps = [block.mlp for block in blocks if isinstance(getattr(block, 'mlp', None), Mlp)]
    dense = len(mlps) == len(blocks) > 0
    check(dense, 'extra_mlps', extra_mlps, f'0, {model_name} is no dense vision transformer')
    ratio = mlps[0].fc1.out_features / mlps[0].fc1.in_features
    return ratio * (len(mlps) + extra_mlps) / len(mlps)
