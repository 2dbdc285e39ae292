"""A model as its entry point builds it: timm's own builder, and weights that fit or are refused."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, list_models

from ..moe.config import check
from .sources import fit_pretrained, known_weights, source_of
from .sparse_model import MoeVisionTransformer
from .weight_files import named_source


def build(
    name: str,
    method: str,
    size: dict[str, Any],
    pretrained: bool,
    upcycle: str | None = None,
    **kwargs: Any,
) -> MoeVisionTransformer:
    """A model as timm builds it.

    Args:
        name: Of its entry point.
        method: Key of `METHODS`.
        size: Arguments that `kwargs` may change.
        pretrained: Whether to load weights, which `pretrained_cfg_overlay` has to name.
        upcycle: What to start from instead, see `upcycle_source`.
        **kwargs: Of `MoeVisionTransformer` and of `build_model_with_cfg`.

    Raises:
        ValueError: An argument is impossible, or the weights cannot be read or do not fit.
    """
    _check_sources(name, pretrained, kwargs)
    depth = kwargs.get('depth', size['depth'])
    # of `features_only`: the last three blocks, or all of a shallower model
    out_indices = kwargs.pop('out_indices', min(3, depth) if type(depth) is int else 3)
    overlay = kwargs.pop('pretrained_cfg_overlay', None) or {}
    if upcycle is not None:
        check(not pretrained, 'pretrained', True, f'False with upcycle={upcycle!r}')
        pretrained = True
    config = kwargs.get('pretrained_cfg')
    given = config if isinstance(config, dict) else {}
    filter_fn = fit_pretrained
    if pretrained:
        overlay, filter_fn = known_weights(upcycle, given, overlay, kwargs.get('cache_dir'))
    source = source_of({**given, **overlay})
    with named_source(source) if pretrained and source else nullcontext():
        return build_model_with_cfg(
            MoeVisionTransformer,
            name,
            pretrained,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=filter_fn,
            feature_cfg={'out_indices': out_indices, 'feature_cls': 'getter'},
            method=method,
            **{**size, **kwargs},
        )


def _check_sources(name: str, pretrained: Any, kwargs: dict[str, Any]) -> None:
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
