"""`timm.create_model` as entry points and tasks call it, and the options of a row.

Keywords go to timm's builder, which raises what timm knows. Weights come afterwards, all that fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from os import PathLike
from typing import Any

import timm
import torch
from timm.layers import Mlp
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    get_arch_name,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
)
from torch import nn

from ..moe.config import check, did_you_mean
from ..moe.methods import METHODS
from .convert import put_fresh_layers
from .hosts import MODULES, MOE_HOST, Transformer, method_of
from .moe_vit import (
    MoeEva,
    MoeVisionTransformer,
    SparseModel,
    check_method,
    check_patches,
    check_vit_arguments,
    moe_options,
)
from .normalization import check_normalization, stated_normalization
from .saved import record_arguments
from .upcycle import read_upcycling, refuse_unused
from .weights import (
    GIVEN,
    Described,
    check_one_source,
    find_source,
    load_checkpoint,
    load_weights,
    overlay_for,
    place_of,
    read_fitting,
    source_of,
    weights_in,
)

__all__: list[str] = []  # register_model adds the entry point

# Options with which timm changes weights that are whole, or takes a part of them.
_ADAPTED = (
    *('in_chans', 'num_classes', 'pretrained_cfg_overlay'),
    *('features_only', 'out_indices', 'feature_cls'),
)
# Fields of a model that give it weights to start from, of which experts may be made.
STARTS = ('checkpoint', 'checkpoint_path', 'pretrained', 'upcycle')


def build(
    name: str,
    method: str,
    size: dict[str, Any],
    pretrained: bool,
    upcycle: str | PathLike[str] | None = None,
    **kwargs: Any,
) -> MoeVisionTransformer:
    """A model of this package as timm builds it."""
    model: MoeVisionTransformer = build_sparse(
        MoeVisionTransformer, name, name, method, pretrained, upcycle, **{**size, **kwargs}
    )
    return model


@register_model
def moe_host(
    pretrained: bool = False, host: str | None = None, method: str | None = None, **kwargs: Any
) -> MoeVisionTransformer | MoeEva:
    """A vision transformer of timm with MoE layers, as converted models and configs name it."""
    known = isinstance(host, str) and timm.is_model(host) and get_arch_name(host) != MOE_HOST
    check(known, 'host', host, "the name of one of timm's VisionTransformers or Evas")
    check_method(method)
    assert host is not None and method is not None
    allowed = 'None: pretrained=True starts from weights of the host, or of pretrained_cfg_overlay'
    check(kwargs.get('upcycle') is None, 'upcycle', kwargs.get('upcycle'), allowed)
    make = partial(_fresh, host)
    return build_sparse(make, MOE_HOST, host, method, pretrained, **kwargs)


def _fresh(host: str, method: str, **kwargs: Any) -> Any:
    names = moe_options(method) | {'upcycling'}
    options = {name: kwargs.pop(name) for name in names & kwargs.keys()}
    model = model_entrypoint(host)(pretrained=False, **kwargs)
    put_fresh_layers(model, method, **options)
    return model


def build_sparse(
    make: Callable[..., nn.Module],
    name: str,
    known_as: str,
    method: str,
    pretrained: bool,
    upcycle: str | PathLike[str] | None = None,
    **kwargs: Any,
) -> Any:
    """A model with experts of any class, and its weights, which timm may know by another name."""
    check(isinstance(pretrained, bool), 'pretrained', pretrained, 'True or False')
    check(not (pretrained and upcycle), 'pretrained', True, f'False with upcycle={upcycle!r}')
    saved = kwargs.get('pretrained_model_args') or {}  # what config.json says, since timm 1.0.31
    kwargs = _without_past(kwargs, saved, method)
    starts = pretrained or upcycle is not None
    if not starts and kwargs.get('upcycling') is not None:
        ways = 'pretrained=True' if name == MOE_HOST else 'upcycle=SOURCE or pretrained=True'
        refuse_unused(read_upcycling(kwargs['upcycling']), ways)
    depth = kwargs.get('depth', 3)
    # of `features_only`: the last three blocks, or all of a shallower model
    out_indices = kwargs.pop('out_indices', min(3, depth) if type(depth) is int else 3)
    feature_cfg = {'out_indices': out_indices, 'feature_cls': 'getter'}
    stated = kwargs.get('pretrained_cfg') or kwargs.get('pretrained_cfg_overlay')
    if not (starts or stated or name == MOE_HOST):
        return build_model_with_cfg(
            make, name, False, feature_cfg=feature_cfg, method=method, **kwargs
        )
    source = _Source(known_as, kwargs, saved_as=name if saved else '')
    overlay = source.overlay
    if starts:
        overlay, described = source.found(upcycle, kwargs.get('cache_dir'))
    config = kwargs.pop('pretrained_cfg', None)
    kwargs.pop('pretrained_cfg_overlay', None)
    if name == MOE_HOST and source.name:
        exists = not pretrained or bool(source_of({**source.config, **overlay}))
        check(exists, 'pretrained', True, f'False, timm has no weights of {known_as}')
        config = replace(source.known(), architecture=MOE_HOST, custom_load=False)
    model: Any = build_model_with_cfg(
        make,
        name,
        False,
        pretrained_cfg=config,
        pretrained_cfg_overlay=overlay,
        feature_cfg=feature_cfg,
        method=method,
        **kwargs,
    )
    if starts:
        whole = model.model if kwargs.get('features_only') else model
        load_weights(whole, described, kwargs.get('cache_dir'), source.follow)
        model.pretrained_cfg.update({k: whole.pretrained_cfg[k] for k in ('mean', 'std')})
    return model


class _Source:
    """What a call states of weights, and what timm knows by the name of a model."""

    def __init__(self, name: str, kwargs: dict[str, Any], saved_as: str = '') -> None:
        stated = kwargs.get('pretrained_cfg')
        stated = stated.to_dict() if isinstance(stated, PretrainedCfg) else stated or ''
        check(isinstance(stated, str | dict), 'pretrained_cfg', stated, 'a dictionary, or a tag')
        overlay = kwargs.get('pretrained_cfg_overlay') or {}
        check(isinstance(overlay, dict), 'pretrained_cfg_overlay', overlay, 'a dictionary')
        channels = kwargs.get('in_chans')
        channels = channels if type(channels) is int and channels > 0 else 3  # the model says it
        numbers = stated_normalization(overlay, 'pretrained_cfg_overlay.', channels=channels)
        self.overlay = overlay if numbers is None else {**overlay, **vars(numbers)}
        self.name, self.config = '', {} if isinstance(stated, str) else stated
        if isinstance(stated, dict):
            check_normalization(stated, 'pretrained_cfg.')
        else:
            self.name = f'{get_arch_name(name)}.{stated}' if stated else name
            self.config = place_of(self.known().to_dict())
        self.own = Described.of({}, self.name or saved_as, kwargs.get('pretrained_model_args'))
        # numbers that the call states are before those of a run
        self.follow = not {'mean', 'std'} & {*overlay, *self.config}

    def known(self) -> PretrainedCfg:
        """What timm has under the name."""
        found = get_pretrained_cfg(self.name)
        assert found is not None
        return found

    def found(self, upcycle: Any, cache_dir: Any) -> tuple[dict[str, Any], Described]:
        """As `overlay_for`."""
        return overlay_for(upcycle, self.config, self.overlay, self.own, cache_dir)


def _without_past(kwargs: dict[str, Any], saved: dict[str, Any], method: str) -> dict[str, Any]:
    """Arguments without those of saved weights that the others leave without effect."""
    if not saved:
        return kwargs
    options = {k: v for k, v in kwargs.items() if k in moe_options(method) - {'moe_layers'}}
    without_effect = {'upcycling', *METHODS[method].config.of_preset(**options).unused()}
    return {
        name: value
        for name, value in kwargs.items()
        if name not in without_effect or name not in saved or saved[name] != value
    }


def create_model(
    model_name: str, moe: dict[str, Any] | None = None, extra_mlps: int = 0, **kwargs: Any
) -> nn.Module:
    """`timm.create_model` for a config: experts for any host, and weights that fit or are refused.

    `moe` has the options of experts, with their `method` for a model of timm. `extra_mlps` widens
    a dense model by as many MLPs, spread over its blocks.
    """
    if not timm.is_model(model_name):
        hint = did_you_mean(model_name, timm.list_models()) or '; timm.list_models() lists them'
        raise ValueError(f'model_name={model_name!r} is not a timm model{hint}')
    kwargs = {name: value for name, value in kwargs.items() if value is not None}  # as timm does
    allowed = 'the name of the host, and the method in moe'
    check(get_arch_name(model_name) != MOE_HOST, 'model_name', model_name, allowed)
    check(moe is None or isinstance(moe, dict), 'moe', moe, 'a dictionary of options, or None')
    check_one_source(kwargs)
    if isinstance(stated := kwargs.get('pretrained_cfg'), dict):
        check_normalization(stated, 'pretrained_cfg.')
    for name, value in (moe or {}).items():
        check(name not in kwargs, name, kwargs.get(name), f'moe.{name}={value!r} is set, change it')
    if path := kwargs.get('checkpoint_path'):
        kwargs['checkpoint_path'] = weights_in(str(path))  # timm reads no folders here
    dense = method_of(model_name) is None
    if dense and timm.models.is_model_in_modules(model_name, ('vision_transformer', 'shipped')):
        check_vit_arguments(kwargs)
    if dense and moe is not None:
        check(not extra_mlps, 'extra_mlps', extra_mlps, '0, moe gives the model experts')
        check_method(moe.get('method'), 'moe.method')
        kwargs = {'host': model_name, **moe, **_from_pretrained(kwargs)}
        model = timm.create_model(MOE_HOST, **kwargs)
    else:
        named = (moe or {}).get('method')
        check(named is None, 'moe.method', named, f'left out, {model_name} names it')
        kwargs.update(moe or {})
        if extra_mlps:
            kwargs['mlp_ratio'] = _wider(model_name, extra_mlps, kwargs)
        model = _create(model_name, kwargs)
    check_patches(model, kwargs)
    record_arguments(model, kwargs)
    return model


def _create(model_name: str, kwargs: dict[str, Any]) -> nn.Module:
    """A model by its own entry point; a dense vision transformer is never half loaded."""
    fitted = timm.models.is_model_in_modules(model_name, MODULES) and method_of(model_name) is None
    if fitted and kwargs.get('pretrained') and not kwargs.get('features_only'):
        check(kwargs['pretrained'] is True, 'pretrained', kwargs['pretrained'], 'True or False')
        source, cache_dir = _Source(model_name, kwargs), kwargs.get('cache_dir')
        overlay, described = source.found(None, cache_dir)
        given = {**kwargs, 'pretrained': False, 'pretrained_cfg_overlay': overlay}
        model = timm.create_model(model_name, **given)
        load_weights(model, described, cache_dir, source.follow)
        return model
    # timm would compare no checksums, and say nothing of a file that is not there
    model = timm.create_model(model_name, **{**kwargs, 'checkpoint_path': ''})
    if checkpoint_path := kwargs.get('checkpoint_path'):
        load_checkpoint(model, checkpoint_path)
    return model


def _from_pretrained(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the host as weights that are fitted; timm would want it to have experts."""
    others = dict(kwargs)
    if path := others.pop('checkpoint_path', None):
        given = kwargs.get('pretrained_cfg_overlay') or {}
        others |= {'pretrained': True}
        others['pretrained_cfg_overlay'] = {**given, 'file': path, 'state_dict': None}
    return others


def _wider(model_name: str, extra_mlps: int, kwargs: dict[str, Any]) -> float:
    """The `mlp_ratio` that spreads `extra_mlps` over all blocks."""
    valid = isinstance(extra_mlps, int) and extra_mlps > 0
    check(valid, 'extra_mlps', extra_mlps, 'a whole number, at least 0')
    with torch.device('meta'):  # for depth and ratio only
        plain = {**kwargs, 'pretrained': False, 'checkpoint_path': ''}
        model: Any = timm.create_model(model_name, **plain)
    blocks: Any = model.blocks if isinstance(model, Transformer) else []
    mlps = [block.mlp for block in blocks if isinstance(getattr(block, 'mlp', None), Mlp)]
    dense = len(mlps) == len(blocks) > 0
    check(dense, 'extra_mlps', extra_mlps, f'0, {model_name} is no dense vision transformer')
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
        # of a model with experts what was saved is not what the call says, see `build_sparse`
        return timm.create_model(source, pretrained=True, **kwargs)
    config = {**described.config, **place}
    return create_model(name, pretrained=True, pretrained_cfg=config, **arguments)


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
    model: Any = create_model(model_name, moe, extra_mlps, **kwargs)
    model.upcycling = how
    return model


def check_upcycled(model: nn.Module) -> None:
    """Refuses a model that says how its experts are made of dense weights, and was given none."""
    if isinstance(model, SparseModel) and model.weights_report is None:
        refuse_unused(read_upcycling(model.upcycling), 'checkpoint=FILE or pretrained=True')


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
        _, described = overlay_for(named.get('upcycle'), config, overlay, Described())
    except ValueError:  # it is gone, and weights of another network would be refused
        return result
    known = described.config.keys() - {'mean', 'std', *config}
    found = {**{name: described.config[name] for name in known}, **overlay}
    return {**result, **({'pretrained_cfg_overlay': found} if found else {})}


def options_in_full(model: Mapping[str, Any]) -> dict[str, Any]:
    """What the MoE layers of a config's model would be built with today."""
    moe, name = model.get('moe') or {}, model.get('model_name')
    own = method_of(name) if isinstance(name, str) else None
    # a model of this package takes the options of its method beside its own too
    given = {**model, **moe} if own is not None else moe
    method = own if own is not None else moe.get('method')
    if method not in METHODS:
        return {}
    known = METHODS[method].config.option_names()
    options: dict[str, Any] = {n: v for n, v in given.items() if n in known}
    try:
        config = METHODS[method].config.from_options(**options)
        options = {n: v for n, v in asdict(config).items() if n not in config.unused()}
    except ValueError:  # a finished comparison may name what is possible no more
        pass
    if any(model.get(start) for start in STARTS):
        options['upcycling'] = asdict(read_upcycling(model.get('upcycling')))
    return {'method': method, **options}
