"""A model as its entry point builds it: timm's own builder, and weights that fit or are refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    get_arch_name,
    get_pretrained_cfg,
    list_models,
    load_pretrained,
)
from torch import nn

from ..moe.config import check
from ..moe.methods import METHODS
from .arguments import moe_options
from .described import Described
from .hosts import MOE_HOST, Transformer
from .normalization import check_normalization, stated_normalization
from .sources import check_one_source, fit_pretrained, known_weights, place_of, source_of
from .sparse_model import MoeVisionTransformer
from .upcycle import read_upcycling, refuse_unused
from .weight_files import named_source, no_reading

Filter: TypeAlias = Callable[..., Any]


def build(
    name: str,
    method: str,
    size: dict[str, Any],
    pretrained: bool,
    upcycle: str | PathLike[str] | None = None,
    **kwargs: Any,
) -> MoeVisionTransformer:
    """A model as timm builds it."""
    check_sources(name, pretrained, kwargs)
    check_one_source({'pretrained': pretrained, 'upcycle': upcycle})
    arguments = {**size, **kwargs, 'weights_of': tagged(name, kwargs.get('pretrained_cfg'))}
    model: MoeVisionTransformer = build_sparse(
        MoeVisionTransformer, name, method, pretrained, upcycle, **arguments
    )
    return model


def build_sparse(
    make: Callable[..., nn.Module],
    name: str,
    method: str,
    pretrained: bool,
    upcycle: str | PathLike[str] | None = None,
    weights_of: str = '',
    **kwargs: Any,
) -> Any:
    """A model with experts of any class, and its weights, as timm builds it."""
    saved = kwargs.get('pretrained_model_args') or {}  # what config.json says, since timm 1.0.31
    kwargs = _without_past(kwargs, saved, method)
    if not pretrained and upcycle is None:
        ways = 'pretrained=True' if name == MOE_HOST else 'upcycle=SOURCE or pretrained=True'
        refuse_unused(read_upcycling(kwargs.get('upcycling')), ways)
    depth = kwargs.get('depth', 3)
    # of `features_only`: the last three blocks, or all of a shallower model
    out_indices = kwargs.pop('out_indices', min(3, depth) if type(depth) is int else 3)
    config, overlay = kwargs.get('pretrained_cfg'), _overlay(kwargs)
    kwargs.pop('pretrained_cfg_overlay', None)
    config = config.to_dict() if isinstance(config, PretrainedCfg) else config
    given = _place_by_name(weights_of) if weights_of else config or {}
    filter_fn: Filter = fit_pretrained
    if pretrained := pretrained or upcycle is not None:
        own = Described.of({}, weights_of or (name if saved else ''), saved)
        overlay, filter_fn = known_weights(upcycle, given, overlay, own, kwargs.get('cache_dir'))
    source = source_of({**given, **overlay})
    reading = pretrained and source
    with named_source(source) if reading else nullcontext():
        return build_model_with_cfg(
            no_reading(make) if reading else make,
            name,
            pretrained,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=no_reading(
                filter_fn, f'checkpoint {source!r} does not fit the model'
            ),
            feature_cfg={'out_indices': out_indices, 'feature_cls': 'getter'},
            method=method,
            **kwargs,
        )


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


def known_by_name(name: str, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Filter]:
    """As `known_weights`, for a dense model of timm."""
    check_sources(get_arch_name(name), kwargs['pretrained'], kwargs)
    config = kwargs.get('pretrained_cfg')
    weights_of = tagged(name, config)
    config = config.to_dict() if isinstance(config, PretrainedCfg) else config
    config = _place_by_name(weights_of) if weights_of else config or {}
    own = Described({}, weights_of)
    return known_weights(None, config, _overlay(kwargs), own)


def _overlay(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`pretrained_cfg_overlay` of a call, with a mean and a deviation for each channel."""
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    channels = kwargs.get('in_chans')
    channels = channels if type(channels) is int and channels > 0 else 3  # refused by the model
    numbers = stated_normalization(overlay, 'pretrained_cfg_overlay.', channels=channels)
    return overlay if numbers is None else {**overlay, **vars(numbers)}


def tagged(name: str, config: Any) -> str:
    """The name under which timm knows the weights of a model; empty if the call states others."""
    if isinstance(config, str) and config:
        return f'{get_arch_name(name)}.{config}'
    return '' if config else name


def config_of_name(name: str) -> PretrainedCfg:
    """What timm knows of the weights of a model."""
    found = get_pretrained_cfg(name)
    assert found is not None
    return found


def _place_by_name(name: str) -> dict[str, Any]:
    return place_of(config_of_name(name).to_dict())


def load_whole(model: Transformer, filter_fn: Filter, cache_dir: str | Path | None = None) -> None:
    """The weights that timm's configuration of a model names, all that fit or none."""
    timms: Any = model
    config = {**timms.pretrained_cfg, 'custom_load': False}
    source = source_of(config)
    allowed = f'False, timm has no weights of {config["architecture"]}'
    check(bool(source), 'pretrained', True, allowed)
    with named_source(source):
        load_pretrained(
            model,
            config,
            # the filter has fitted the head, and timm is not strict where this number differs
            num_classes=config['num_classes'],
            filter_fn=no_reading(filter_fn, f'checkpoint {source!r} does not fit the model'),
            cache_dir=cache_dir,
        )


def check_sources(name: str, pretrained: Any, kwargs: dict[str, Any]) -> None:
    """Refuses what cannot say which weights a model begins with; timm fails in other ways."""
    check(isinstance(pretrained, bool), 'pretrained', pretrained, 'True or False')
    config, overlay = kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay')
    if isinstance(config, str) and config:
        tags = [model.partition('.')[2] for model in list_models(f'{name}.*', include_tags=True)]
        check(config in tags, 'pretrained_cfg', config, f'a dictionary, or a tag of {tags}')
    kinds = str | dict | PretrainedCfg | None
    check(isinstance(config, kinds), 'pretrained_cfg', config, 'a dictionary, or a tag')
    fits = overlay is None or isinstance(overlay, dict)
    check(fits, 'pretrained_cfg_overlay', overlay, 'a dictionary')
    if isinstance(config, dict):
        check_normalization(config, 'pretrained_cfg.')
